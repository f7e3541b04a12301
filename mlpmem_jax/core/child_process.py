"""A child process that does not outlive its parent.

An orphan that continued to train would write into the same folder as the child of the next attempt.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

_PARENT = "MLPMEM_PARENT_PROCESS"
_PR_SET_PDEATHSIG = 1  # of Linux's prctl.h; elsewhere there is no such call


def environment() -> dict[str, str]:
    """What tells a child that this process is its parent."""
    return {_PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """Where a parent set `environment`, asks the kernel for SIGTERM at its death; does nothing elsewhere."""
    parent = os.environ.pop(_PARENT, None)  # this process's own children have another parent
    if parent is None:
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it died before that
        sys.exit(1)
