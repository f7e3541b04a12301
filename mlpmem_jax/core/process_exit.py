"""How one process of a job of several ends at once, past every `finally`, with one last line that says why."""

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

_LINGER_SECONDS = 2.0  # of process 0, which coordinates: when it ends, JAX ends the rest before they can say why
_ending = threading.Lock()  # never released: the first reason to end is the one that is printed


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
    """While inside, `text` is the last line of this process when JAX ends it, and the exit code that of `Stopped`.

    JAX's threads call abort() when a process of the job cannot be reached. Python's own signal handlers would run
    later, which is never; this one runs at once.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def explain(signum):
        if not _ending.acquire(blocking=False):
            time.sleep(2 * _LINGER_SECONDS)  # another thread has said why this process ends, and ends it meanwhile
        os.write(2, f"mlpmem: error: {text}\n".encode())
        os._exit(Stopped.exit_code)

    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGABRT, explain)
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, ctypes.c_void_p(signal.SIG_DFL))
