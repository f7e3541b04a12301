"""Preemption of a multi-process job: SIGTERM to one process ends all, between two shards or at a checkpoint."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from mlpmem_jax.core import jax_internals, process_exit
from mlpmem_jax.core.errors import Stopped

WORK_IS_KEPT = "Completed work is kept: run the same command again, with any number of processes"
_PREEMPTED = f"the job was preempted. {WORK_IS_KEPT}"
_POLL_SECONDS = 1.0
_deferred = threading.Lock()  # held by work that ends by itself, at a suitable point


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Within the context, a thread ends this process when the job is preempted, whatever its main thread is doing."""
    finished = threading.Event()
    watcher = threading.Thread(target=_end_when_preempted, args=(finished,), daemon=True)
    watcher.start()
    yield
    finished.set()  # not after an error: this process then ends with the error
    watcher.join()


def _end_when_preempted(finished: threading.Event) -> None:
    """A stage may end at any time, losing only unfinished shards and without agreement between processes, except for
    work in `deferred`. All processes linger before they exit, so that none reports another as lost.
    """
    while not finished.wait(_POLL_SECONDS):
        if jax_internals.preemption_notice_received():
            with _deferred:
                process_exit.end(_PREEMPTED, Stopped.exit_code, lingers=True)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within the context, preemption does not end this process: the work itself checks for it and raises `Stopped`."""
    _deferred.acquire()
    yield
    _deferred.release()  # not after an error: this process then ends with the error
