"""Reads an Arrow stream of the reference implementation once, sequentially, with errors that name the row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from etils import epath

from mlpmem_jax.core import storage
from mlpmem_jax.core.errors import UserError, require
from mlpmem_jax.core.progress import say

_COLUMNS = {"targets": ("id_cnt", "token_id", "prob", "label"), "datastore": ("keys", "vals")}


class Stream:
    """A stream of targets or of a datastore; `kind` says which, determined from its columns.

    Raises:
      UserError: the file is not such a stream.
    """

    def __init__(self, source: str):
        self._pa = require("pyarrow", extra="hub")
        self.source, self._row = source, 0
        try:
            self._file = self._pa.memory_map(source)
            self._reader = self._pa.ipc.open_stream(self._file)
        except (OSError, self._pa.ArrowInvalid) as error:
            raise UserError(f"{source}: expected an Arrow stream: {error}") from error
        names = set(self._reader.schema.names)
        kinds = [kind for kind, columns in _COLUMNS.items() if names >= set(columns)]
        if not kinds:
            expected = " or ".join(f"{', '.join(columns)} ({kind})" for kind, columns in _COLUMNS.items())
            raise UserError(f"{source}: has the columns {', '.join(sorted(names))}; expected {expected}")
        self.kind = kinds[0]
        file = epath.Path(source)
        self.origin = {"imported": {"file": file.name, "checksum": storage.checksum({file.name: file})}}

    def error(self, row: int, text: str) -> UserError:
        return UserError(f"{self.source}: row {row}: {text}")

    def blocks(self, sizes: Iterable[int]) -> Iterator[tuple[int, dict]]:
        """(first row, columns by name) for consecutive blocks with `sizes` rows."""
        pending, held, schema = [], 0, self._reader.schema
        for size in sizes:
            while held < size:
                pending.append(self._next(held))
                held += len(pending[-1])
            table = self._pa.Table.from_batches(pending, schema)
            pending, held = table.slice(size).to_batches(), held - size
            block = table.slice(0, size).combine_chunks()
            yield self._row, {name: block[name].combine_chunks() for name in _COLUMNS[self.kind]}
            self._row += size
        self._left_over = held

    def _next(self, held: int):
        try:
            return self._reader.read_next_batch()
        except StopIteration:
            raise self.error(self._row + held, "is missing, the stream ends before it") from None
        except (OSError, self._pa.ArrowInvalid) as error:
            raise self.error(self._row + held, f"could not be read (truncated?): {error}") from error

    def finish(self, less_than: int) -> None:
        """Reads the remaining rows, which must be less than a sequence."""
        rest = self._left_over
        while rest < less_than:
            try:
                rest += len(self._reader.read_next_batch())
            except StopIteration:
                break
        if rest >= less_than:
            raise self.error(self._row, "and those after it are more than the tokens of this split")
        if rest:
            say(f"import: the last {rest} rows are not a whole sequence and are ignored")

    def numbers(self, column, dtype: str, first: int) -> np.ndarray:
        """A column of numbers without nulls as an array."""
        if column.null_count:
            raise self.error(first + int(np.argmax(column.is_null().to_numpy(zero_copy_only=False))), "holds a null")
        return column.to_numpy(zero_copy_only=False).astype(dtype)
