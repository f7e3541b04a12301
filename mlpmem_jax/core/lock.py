"""A lock on a working directory: the file lock.json names the one process that works in it.

The file is written and removed by TensorStore's conditional writes, so it works on local disks, on network file systems
and in buckets. Its holder rewrites it every few seconds. Another process decides whether the holder is alive by the
process's start time on the same machine, and on other machines by whether the file still changes; clocks are not
compared. A file system that refuses locks of the operating system is reported at once: TensorStore and Orbax can write
nothing there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator

import tensorstore as ts

from mlpmem_jax.core import storage
from mlpmem_jax.core.errors import UserError
from mlpmem_jax.core.manifests import absolute
from mlpmem_jax.core.progress import say

FILE = "lock.json"
_BEAT_SECONDS = 10.0  # between two writes of the holder; a bucket allows at most one per second
_REFUSED = "Failed to lock file"  # TensorStore's words
_SILENT_SECONDS = 60.0  # a holder on another machine that has not written for this long is dead


@dataclasses.dataclass(frozen=True)
class Holder:
    """A process that works in the directory.

    Attributes:
      host: name of its machine.
      pid: its process id there.
      since: local time at which it started working, with the UTC offset.
      space: the scope in which its pid is unique: the machine's boot and the container.
      started: its start time, which distinguishes it from a later process with the same pid.
    """

    host: str
    pid: int
    since: str
    space: str
    started: str

    @classmethod
    def this_process(cls) -> Holder:
        since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        return cls(socket.gethostname(), os.getpid(), since, _space(), _started(os.getpid()))

    @property
    def is_dead(self) -> bool | None:
        """Whether it has ended; None if this process cannot tell."""
        if not self.space or self.space != _space():
            return None
        return _started(self.pid) != self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


def _space() -> str:
    """The scope in which process ids are unique; "" if unknown (other than on Linux)."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Clock ticks from the machine's boot to the start of a process; "" if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]  # zombies have ended


class _Lock:
    """The lock file of one working directory."""

    def __init__(self, workdir: str):
        self._path = absolute(workdir)
        self._store = ts.KvStore.open(storage.kvstore_spec(self._path)).result()
        self._holder = Holder.this_process()
        self._generation = b""

    def read(self) -> tuple[Holder | None, bytes]:
        """The holder, and the generation of the file."""
        read = self._store.read(FILE).result()
        try:
            holder = Holder(**json.loads(read.value)["holder"]) if read.state == "value" else None
        except (ValueError, KeyError, TypeError):
            holder = None  # an incomplete file, or another program's
        return holder, read.stamp.generation

    def write(self, generation: bytes, remove: bool = False) -> bool:
        """Writes this process into the file, or removes it, if its generation is unchanged; returns whether it was."""
        content = None if remove else json.dumps({"holder": dataclasses.asdict(self._holder), "at": time.time()})
        self._generation = self._store.write(FILE, content, if_equal=generation).result().generation
        return bool(self._generation)

    def take(self) -> None:
        """Takes the lock, waiting if necessary.

        Raises:
          UserError: another process works in the directory.
        """
        holder, generation = self.read()
        if holder is not None and holder.is_dead is None:
            say(f"{self._path}: looking for up to {_SILENT_SECONDS:.0f} s whether {holder}, still works there")
            end = time.monotonic() + _SILENT_SECONDS
            while time.monotonic() < end and self.read()[1] == generation:
                time.sleep(_BEAT_SECONDS / 5)
        if (holder is not None and holder.is_dead is False) or not self.write(generation):
            raise UserError(
                f"{self._path}: {self.read()[0] or 'another process'}, works there; wait for it, stop it, or choose "
                f"another config.workdir (if this is a copy of the folder where it works, delete {FILE})"
            )

    def keep(self, finished: threading.Event) -> None:
        """Rewrites the file until finished; ends this process if another one has taken over the directory."""
        while not finished.wait(_BEAT_SECONDS):
            with contextlib.suppress(ValueError, OSError):  # the work itself will report a full disk
                if not self.write(self._generation):
                    print(f"mlpmem: error: {self._path}: taken over by {self.read()[0]}", file=sys.stderr, flush=True)
                    os._exit(UserError.exit_code)

    def release(self) -> None:
        with contextlib.suppress(ValueError, OSError):
            self.write(self._generation, remove=True)


def no_locks(folder, reason: str) -> UserError:
    """The error for a folder whose file system refuses locks of the operating system."""
    return UserError(
        f"{folder}: its file system refuses to lock files ({reason}), without which nothing can be written there; "
        "mount it with locks (Lustre: -o flock; NFS: with its lock service), or choose another config.workdir"
    )


_held: list[_Lock] = []


@contextlib.contextmanager
def held(workdir: str) -> Iterator[None]:
    """Within the context, no other process works in the directory. If nothing can be written, nothing is locked.

    Raises:
      UserError: another process works there; says which. Or the file system refuses locks.
    """
    try:
        lock = _Lock(workdir)
        lock.take()
    except (ValueError, OSError) as error:  # read-only: finished artifacts can be used by many at once
        if _REFUSED in str(error):
            reason = str(error).rpartition(_REFUSED)[2].partition(" [")[0].strip(": ")
            raise no_locks(workdir, reason) from error
        lock = None
    if lock is None:  # outside the handler, so that what fails in the context is reported by its own cause
        yield
        return
    finished = threading.Event()
    keeper = threading.Thread(target=lock.keep, args=(finished,), daemon=True)
    keeper.start()
    _held.append(lock)
    try:
        yield
    finally:
        finished.set()
        keeper.join()
        _held.remove(lock)
        lock.release()


def release_all() -> None:
    """Releases all locks; for code that exits immediately, without running `finally` blocks."""
    for lock in _held:
        lock.release()
