"""Storage: buckets, folders with brackets in their names, and detecting changed files.

TensorStore accesses buckets itself; all small files go through etils.epath, which uses fsspec.
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
    # URL scheme: (fsspec's name for it, the package that it needs, our extra). Orbax uses the Google Cloud Storage
    # client library, which comes with gcsfs, to delete old checkpoints.
    "gs": ("gcs", "gcsfs", "gcs"),
    "s3": ("s3", "s3fs", "s3"),
}

_HASHED_BYTES = 2**28
"""Files up to this total size are compared by content, larger ones by size, time, and both ends."""
_END_BYTES = 2**16
_COPIED_BYTES = 2**24
_EVICTION_SHARE = 0.15  # of a node's disk: the higher of kubelet's defaults, imagefs.available and nodefs.available


def check_url(place: str, prefix: str = "") -> None:
    """Checks that a path or URL is of a known kind.

    Raises:
      UserError: it is another kind of URL; the message begins with the prefix.
    """
    scheme, separator, _ = place.partition("://")
    if separator and scheme not in _FILE_SYSTEMS:
        known = ", ".join(f"{name}://" for name in _FILE_SYSTEMS)
        raise UserError(f"{prefix}{place}: expected a path, or a URL that begins with {known}")


def check_local(place: str, prefix: str = "") -> None:
    """Checks that a path, which is read or written without `etils`, is not a URL.

    Raises:
      UserError: it is one; the message begins with the prefix.
    """
    if is_remote(place):
        raise UserError(f"{prefix}{place}: expected a path on this machine; copy from or to the bucket separately")


def prepare(*places: str) -> None:
    """Prepares access to buckets among `places`, which are paths or URLs. Call it before opening anything.

    Raises:
      UserError: a required package is not installed, or the kind of URL is unknown.
    """
    for place in places:
        check_url(place)
        scheme, separator, _ = place.partition("://")
        if not separator:
            continue
        name, package, extra = _FILE_SYSTEMS[scheme]
        try:
            require(package, extra)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        import fsspec.config

        # Folder listings must not be cached: TensorStore and other processes also write to them.
        fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False


def is_remote(path) -> bool:
    """Whether a path is a URL, of an object store, rather than on a file system."""
    return "://" in str(path)


def kvstore_spec(folder: str) -> dict | str:
    """TensorStore's specification of a folder as a key-value store; local ones must be absolute."""
    return f"{folder}/" if is_remote(folder) else {"driver": "file", "path": f"{folder}/"}


def literal(path):
    """The path for libraries that search it by pattern, such that none of its characters is taken as a pattern.

    etils joins path and pattern before it searches, so Orbax would find nothing in a folder named `x[y]`, and would
    write checkpoints without their index there, reporting that only in its log.
    """
    from etils import epath

    path = epath.Path(path)
    if is_remote(path):  # object stores via fsspec; names of buckets and their folders rarely have brackets
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
    """The state of an epath.Path, local or in a bucket.

    etils would also look up the owner's name, which fails for a user without one (a container's --user=12345).
    """
    if is_remote(file):
        status = file.stat()
        return FileState(status.length, status.mtime)
    status = os.stat(file)
    return FileState(status.st_size, int(status.st_mtime))


def is_file(path) -> bool:
    """Whether an epath.Path is a file with content; etils also counts pipes, which would be waited for, and devices."""
    return path.is_file() if "://" in str(path) else os.path.isfile(path)


def folder_bytes(folder) -> int:
    """Total bytes of all files below an epath.Path."""
    return sum(folder_bytes(entry) if entry.is_dir() else state_of(entry).length for entry in folder.iterdir())


def checksum(files: Mapping) -> str:
    """A checksum of files, which also states what it was computed from.

    Args:
      files: epath.Path by a name that does not depend on the location.
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


def temporary_room() -> int:
    """Bytes that may be written to the folder for temporary files, TMPDIR.

    Kubernetes evicts the pods of a node whose disk is nearly full, so a pod leaves a part of it free.
    """
    usage = shutil.disk_usage(tempfile.gettempdir())
    is_pod = "KUBERNETES_SERVICE_HOST" in os.environ
    return max(0, usage.free - int(_EVICTION_SHARE * usage.total)) if is_pod else usage.free


@contextlib.contextmanager
def local_copies(files: Mapping) -> Iterator[pathlib.Path]:
    """A local folder with copies of files in a bucket, for libraries that memory-map files.

    It is in TMPDIR and is deleted at the end of the context.

    Args:
      files: epath.Path by the name of its copy.

    Raises:
      UserError: the disk has not enough space for them.
    """
    needed, room = sum(state_of(file).length for file in files.values()), temporary_room()
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
