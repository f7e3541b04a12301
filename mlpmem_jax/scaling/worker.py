"""`python -m mlpmem_jax.scaling.worker VERB ...`: mlpmem in a child process that does not outlive the sweep.

An orphan that went on training would write into the same folder as the child of the next attempt.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

from mlpmem_jax import cli

PARENT = "MLPMEM_SWEEP_PROCESS"
_PR_SET_PDEATHSIG = 1  # of Linux's prctl.h; elsewhere there is no such call


def main() -> None:
    """Asks the kernel for SIGTERM at the parent's death, and runs the verb."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(os.environ[PARENT]):  # it died before that
        sys.exit(1)
    cli.main(sys.argv[1:])


if __name__ == "__main__":
    main()
