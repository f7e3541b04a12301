"""A child process that does not outlive its parent.

An orphan that kept training would write to the same folder as the child of the next attempt.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

_PARENT = "MLPMEM_PARENT_PROCESS"
_PR_SET_PDEATHSIG = 1  # from Linux's prctl.h; not available elsewhere


def environment() -> dict[str, str]:
    """Environment variables that tell a child process who its parent is."""
    return {_PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """If a parent set `environment`, asks the kernel for a SIGTERM when the parent dies; otherwise does nothing."""
    parent = os.environ.pop(_PARENT, None)  # not inherited: this process's own children have another parent
    if parent is None:
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # the parent has already died
        sys.exit(1)
