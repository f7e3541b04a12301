"""The scratch folder of stage `targets`: what a resumed run need not compute again, deleted when the stage is done."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import numpy as np
from etils import epath

from mlpmem_jax.core.errors import ArtifactError


@contextlib.contextmanager
def writing(path: epath.Path) -> Iterator[None]:
    """Turns errors of writing, a full disk for instance, into one that says what to do.

    Raises:
      ArtifactError: `path` could not be written.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # ScaNN raises RuntimeError
        raise ArtifactError(
            f"{path}: could not be written: {error}. What was complete before is kept: make room (or fix access) and "
            "run the same command again"
        ) from error


def write_whole(path: epath.Path, content: bytes | memoryview) -> None:
    """Writes a file such that whoever reads it finds it whole, or not at all."""
    unfinished = path.with_suffix(".unfinished")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(content)
        unfinished.replace(path)


def save_array(path: epath.Path, array: np.ndarray) -> None:
    """`numpy.save` to any place, whole or not at all."""
    content = io.BytesIO()
    np.save(content, array)
    write_whole(path, content.getbuffer())


def load_array(path: epath.Path) -> np.ndarray:
    """Reads what `save_array` wrote."""
    return np.load(io.BytesIO(path.read_bytes()))


def is_remote(path: epath.Path) -> bool:
    """Whether it lies in an object store."""
    return "://" in str(path)
