"""The scratch folder of stage `targets`: results that a resumed run can reuse, deleted when the stage is finished."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import numpy as np
from etils import epath

from mlpmem_jax.core.errors import ArtifactError


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
