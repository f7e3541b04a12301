"""Places: object storage, and folders whose names have brackets.

TensorStore reads and writes buckets by itself; all small files go through etils.epath, by fsspec.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator

from mlpmem_jax.core.errors import UserError, require

_FILE_SYSTEMS = {
    # Scheme of a URL: (fsspec's name of it, the package that it needs, our extra). Orbax takes the client library of
    # Google Cloud Storage, which comes with gcsfs, to delete old checkpoints.
    "gs": ("gcs", "gcsfs", "gcs"),
    "s3": ("s3", "s3fs", "s3"),
}


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
