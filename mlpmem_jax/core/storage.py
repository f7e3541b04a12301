"""Places: object storage, folders whose names have brackets, and what tells that files have changed.

TensorStore reads and writes buckets by itself; all small files go through etils.epath, by fsspec.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from mlpmem_jax.core.errors import UserError, require

_FILE_SYSTEMS = {
    # Scheme of a URL: (fsspec's name of it, the package that it needs, our extra). Orbax takes the client library of
    # Google Cloud Storage, which comes with gcsfs, to delete old checkpoints.
    "gs": ("gcs", "gcsfs", "gcs"),
    "s3": ("s3", "s3fs", "s3"),
}

_HASHED_BYTES = 2**28
"""Files of up to this size together are recognized by their content, larger ones by size, time, and both ends."""
_END_BYTES = 2**16
_COPIED_BYTES = 2**24


def prepare(*places: str) -> None:
    """Makes ready to read and write what of `places`, paths or URLs, is in a bucket. Call it before anything is opened.

    Raises:
      UserError: a package that this needs is not installed, or there is no such kind of place.
    """
    for place in places:
        scheme, separator, _ = place.partition("://")
        if not separator or scheme == "file":
            continue
        if scheme not in _FILE_SYSTEMS:
            known = ", ".join(f"{name}://" for name in _FILE_SYSTEMS)
            raise UserError(f"{place}: expected a path, or a URL that begins with {known}")
        name, package, extra = _FILE_SYSTEMS[scheme]
        try:
            require(package, extra)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        import fsspec.config

        # A folder that was listed once would not change: TensorStore and other processes write into it as well.
        fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False


def literal(path):
    """The path as libraries take it that look for files by pattern in it: none of its own characters is one.

    etils joins path and pattern before it looks, so that Orbax finds nothing in a folder named `x[y]`, writes
    checkpoints without their index there, and says so in its log alone.
    """
    from etils import epath

    path = epath.Path(path)
    if "://" in str(path):  # fsspec's object stores; the names of buckets and their folders rarely have brackets
        return path

    class Literal(type(path)):
        def glob(self, pattern: str) -> Iterator[Literal]:
            for name in glob.glob(pattern, root_dir=self):
                yield self / name

    return Literal(path)


class FileState(NamedTuple):
    """Size in bytes, and when the content last changed, in seconds since 1970."""

    length: int
    mtime: int


def state_of(file) -> FileState:
    """Of an epath.Path, here or in a bucket.

    etils looks up the owner's name as well, which a user without one (a container's --user=12345) does not have.
    """
    if "://" in str(file):
        status = file.stat()
        return FileState(status.length, status.mtime)
    status = os.stat(file)
    return FileState(status.st_size, int(status.st_mtime))


def folder_bytes(folder) -> int:
    """Of all files below an epath.Path."""
    return sum(folder_bytes(entry) if entry.is_dir() else state_of(entry).length for entry in folder.iterdir())


def checksum(files: Mapping) -> str:
    """A checksum that changes with the files, and says what of them it was made from.

    Args:
      files: epath.Path by the name that stands for the file wherever it lies.
    """
    stats = {name: state_of(file) for name, file in files.items()}
    by_content = sum(stat.length for stat in stats.values()) <= _HASHED_BYTES
    digest = hashlib.sha256()
    for name, file in files.items():
        if by_content:
            state = hashlib.sha256(file.read_bytes()).hexdigest()
        else:
            state = f"{stats[name].mtime} {_ends(file, stats[name].length)}"
        digest.update(f"{name}\0{stats[name].length}\0{state}\n".encode("utf-8", "surrogateescape"))
    return f"{digest.hexdigest()} ({'content' if by_content else 'names, sizes, times, first and last bytes'})"


def _ends(file, length: int) -> str:
    with file.open("rb") as opened:
        digest = hashlib.sha256(opened.read(_END_BYTES))
        opened.seek(max(0, length - _END_BYTES))
        digest.update(opened.read(_END_BYTES))
    return digest.hexdigest()


@contextlib.contextmanager
def local_copies(files: Mapping) -> Iterator[pathlib.Path]:
    """A folder on this machine's disk with copies of files of a bucket, for libraries that map what they read.

    It lies where TMPDIR says and lasts as long as the context.

    Args:
      files: epath.Path by the name of its copy.

    Raises:
      UserError: the disk has no room for them.
    """
    needed, room = sum(state_of(file).length for file in files.values()), shutil.disk_usage(tempfile.gettempdir()).free
    if needed > room:
        raise UserError(
            f"{next(iter(files.values())).parent}: {needed / 1e9:.1f} GB are copied to {tempfile.gettempdir()}, which "
            f"has room for {room / 1e9:.1f} GB; set the environment variable TMPDIR to a folder with more"
        )
    with tempfile.TemporaryDirectory(prefix="mlpmem_") as folder:
        for name, file in files.items():
            with file.open("rb") as source, open(pathlib.Path(folder) / name, "wb") as copy:
                shutil.copyfileobj(source, copy, _COPIED_BYTES)
        yield pathlib.Path(folder)
