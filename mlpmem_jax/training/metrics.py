"""Training metrics: one JSON line per record, also written to TensorBoard."""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import json
import os
from collections.abc import Mapping

import jax
from etils import epath

from mlpmem_jax.core import json_lines, storage

FILE = "metrics.jsonl"
BOARD = "tensorboard"  # folder of its event files


class MetricsWriter:
    """Appends records to FOLDER/metrics.jsonl and, for local folders, to TensorBoard event files.

    A separate thread writes, so that a training step never waits for a disk. Objects in a bucket cannot be appended to
    and allow one write per second, so there `flush` writes all records at once.
    """

    def __init__(self, folder, first_step: int):
        """Opens the files; drops records from `first_step` on, which an interrupted run wrote after a checkpoint."""
        self._enabled, self._lines = jax.process_index() == 0, []
        if not self._enabled:
            return
        self._file, self._is_local = epath.Path(folder) / FILE, not storage.is_remote(folder)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "metrics")
        self._pending: collections.deque[concurrent.futures.Future] = collections.deque()
        content = self._file.read_bytes() if self._file.exists() else b""
        self._lines = _up_to(content, first_step)
        self._board = None
        if self._is_local:
            if len(kept := b"".join(self._lines)) < len(content):
                os.truncate(self._file, len(kept))
            import tensorboardX

            self._board = tensorboardX.SummaryWriter(str(epath.Path(folder) / BOARD), purge_step=first_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records `values` (name to number) at `step`.

        Raises:
          OSError: an earlier record could not be written.
        """
        if not self._enabled:
            return
        self._raise_errors(waits=False)
        record = {"step": step, **{name: float(value) for name, value in values.items()}}
        self._lines.append(json.dumps(record).encode() + b"\n")
        if self._is_local:
            self._pending.append(self._thread.submit(_append, self._file, self._lines[-1]))
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, float(value), step)

    def flush(self) -> None:
        """Starts writing the records to a bucket, in the background; call it with every checkpoint."""
        if self._enabled and not self._is_local:
            self._pending.append(self._thread.submit(self._file.write_bytes, b"".join(self._lines)))

    def records(self) -> list[dict]:
        """All records of the run so far; empty on every process but the first."""
        return json_lines.parsed(self._lines)

    def close(self) -> None:
        """Waits until everything is written.

        Raises:
          OSError: a record could not be written.
        """
        if not self._enabled:
            return
        self.flush()
        self._raise_errors(waits=True)
        self._thread.shutdown()
        if self._board is not None:
            self._board.close()

    def _raise_errors(self, waits: bool) -> None:
        while self._pending and (waits or self._pending[0].done()):
            self._pending.popleft().result()


def _up_to(content: bytes, step: int) -> list[bytes]:
    """The lines of a record file up to the first with a later step or an incomplete end.

    Damaged lines among them are kept.
    """

    def belongs(line: bytes) -> bool:
        return line.endswith(b"\n") and all(record.get("step", 0) <= step for record in json_lines.parsed([line]))

    return list(itertools.takewhile(belongs, content.splitlines(keepends=True)))


def _append(file: epath.Path, line: bytes) -> None:
    with open(file, "ab") as opened:  # O_APPEND
        opened.write(line)
