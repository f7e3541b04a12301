"""Exits one process of a multi-process job immediately, without `finally` blocks, after printing the reason."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

import jax

from mlpmem_jax.core import lock
from mlpmem_jax.core.errors import Stopped

_LINGER_SECONDS = 2.0  # for process 0, the coordinator: when it exits, JAX ends the others before they can print why
_ending = threading.Lock()  # never released, so that only the first reason is printed


def end(text: str, code: int, lingers: bool = False) -> NoReturn:
    """Prints `text` as the last line and exits; a process that `lingers`, as process 0 does, exits 2 s later."""
    _ending.acquire()
    lock.release_all()
    print(f"mlpmem: error: {text}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if lingers or jax.process_index() == 0:
        time.sleep(_LINGER_SECONDS)
    os._exit(code)


@contextlib.contextmanager
def explained_abort(text: str) -> Iterator[None]:
    """Within the context, if JAX ends this process, `text` is its last line and the exit code is that of `Stopped`.

    JAX's threads call abort() when a process of the job cannot be reached. Python's own signal handlers would be
    delayed until after that, so never run; this one runs immediately.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def explain(signum):
        if not _ending.acquire(blocking=False):
            time.sleep(2 * _LINGER_SECONDS)  # another thread has printed the reason and is ending the process
        os.write(2, f"mlpmem: error: {text}\n".encode())
        os._exit(Stopped.exit_code)

    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGABRT, explain)
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, ctypes.c_void_p(signal.SIG_DFL))
