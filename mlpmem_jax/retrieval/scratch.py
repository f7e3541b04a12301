"""The scratch folder of stage `targets`: results that a resumed run can reuse, deleted when the stage is finished."""

from __future__ import annotations

import contextlib
import io
import zlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from mlpmem_jax.core.errors import ArtifactError
from mlpmem_jax.core.mesh import barrier


@contextlib.contextmanager
def writing(path: epath.Path) -> Iterator[None]:
    """Converts write errors, such as a full disk, into an error that says what to do.

    Raises:
      ArtifactError: `path` could not be written.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # ScaNN raises RuntimeError
        raise ArtifactError(
            f"{path}: could not be written: {error}. Completed work is kept: free some space (or fix access) and "
            "run the same command again"
        ) from error


def write_whole(path: epath.Path, content: bytes | memoryview) -> None:
    """Writes a file atomically."""
    unfinished = path.with_suffix(".unfinished")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(content)
        unfinished.replace(path)


def save_array(path: epath.Path, array: np.ndarray) -> None:
    """`numpy.save` to any path, atomically."""
    content = io.BytesIO()
    np.save(content, array)
    write_whole(path, content.getbuffer())


def load_array(path: epath.Path) -> np.ndarray:
    """Reads what `save_array` wrote."""
    return np.load(io.BytesIO(path.read_bytes()))


class Measurements:
    """Arrays measured on each shard of keys, kept in a folder so that a resumed run measures only the remaining ones.

    All processes must ask for the same arrays in the same order. They divide the shards among them, or measure each
    together if the search is collective.
    """

    def __init__(self, folder: epath.Path | None = None, is_collective: bool = False):
        """Reuses what an interrupted run left in `folder`. None keeps nothing: every process measures by itself."""
        self._folder, self._is_collective, self._found = folder, is_collective, set()
        if folder is not None and is_collective and folder.exists():
            self._found = _agreed({file.name for file in folder.iterdir() if file.suffix == ".npy"})

    def of_shards(self, name: str, shards: range, measure: Callable[[int], np.ndarray]) -> Iterator[np.ndarray]:
        """`measure(shard)` for each shard, in order.

        Args:
          name: identifies what is measured.
          shards: numbers of the shards.
          measure: a function of the number, with the same result in every process.

        Raises:
          ArtifactError: the folder cannot be written.
        """
        if self._folder is None:
            yield from map(measure, shards)
            return
        files = {shard: self._folder / f"{name}.{shard:04d}.npy" for shard in shards}
        if self._is_collective:
            for shard, file in files.items():
                if file.name in self._found:
                    yield load_array(file)
                    continue
                array = measure(shard)
                if jax.process_index() == 0:
                    save_array(file, array)
                yield array
            return
        for shard, file in files.items():
            if shard % jax.process_count() == jax.process_index() and not file.exists():
                save_array(file, measure(shard))
        barrier(f"targets {name} measured")
        yield from map(load_array, files.values())


def _agreed(names: set[str]) -> set[str]:
    """The names if every process found the same ones, else none: they must take part in the same searches."""
    if jax.process_count() == 1:
        return names
    own = zlib.crc32("\n".join(sorted(names)).encode())
    return names if (multihost_utils.process_allgather(np.uint32(own)) == own).all() else set()
