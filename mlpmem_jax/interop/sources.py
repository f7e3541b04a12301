"""The source of a language model's weights: a file or folder, local or in a bucket, or a Hugging Face name."""

from __future__ import annotations

import contextlib
import fnmatch
import pathlib
from collections.abc import Iterable, Iterator

from etils import epath

from mlpmem_jax.core import storage
from mlpmem_jax.core.errors import UserError, require

_CONFIG = "config.json"
_WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*")  # the first existing kind is read, as in transformers


def _is_hub_name(source: str) -> bool:
    """Whether `source` can only be the name of a model on the Hugging Face hub, NAME or NAME@REVISION."""
    is_path = storage.is_remote(source) or source.startswith((".", "/")) or source.endswith(".gguf")
    return not is_path and source.count("/") <= 1 and not epath.Path(source).exists()


def identity(source: str) -> dict[str, str]:
    """What an artifact built from these weights stores to identify them; nothing for a name on the hub.

    A branch on the hub may move while a job runs, so its commit is stored once it is known.
    """
    if _is_hub_name(source):
        return {}
    files = _files(epath.Path(source))
    return {"weights": storage.checksum(files) if files else "(no such file or folder)"}


@contextlib.contextmanager
def local(source: str) -> Iterator[tuple[pathlib.Path, str]]:
    """Yields (local file or folder, commit of a model on the hub or "").

    Raises:
      UserError: there is nothing with that name on the hub or in the bucket.
    """
    if _is_hub_name(source):
        folder = _snapshot(source)
        yield folder, folder.name
    elif not storage.is_remote(source):
        yield pathlib.Path(source), ""
    else:
        place = epath.Path(source)
        if not (files := _files(place)):
            raise UserError(f"{source}: no such file or folder, or none with {_CONFIG} and weights")
        with storage.local_copies(files) as folder:
            try:
                yield folder / place.name if place.name in files else folder, ""
            except UserError as error:
                raise type(error)(str(error).replace(str(folder), source)) from error


def _files(place: epath.Path) -> dict[str, epath.Path]:
    """The files from which a model is read, by name."""
    if place.is_dir():
        return {name: place / name for name in _needed(entry.name for entry in place.iterdir())}
    return {place.name: place} if place.exists() else {}


def _needed(names: Iterable[str]) -> list[str]:
    names = sorted(names)
    kinds = [fnmatch.filter(names, pattern) for pattern in _WEIGHTS]
    return [name for name in names if name == _CONFIG] + next(filter(None, kinds), [])


def _snapshot(source: str) -> pathlib.Path:
    """The folder of a model from the hub, downloaded unless cached; its name is the commit."""
    hub = require("huggingface_hub", extra="hub")
    name, _, revision = source.partition("@")
    try:
        try:
            info = hub.HfApi().model_info(name, revision=revision or None)
        except Exception:  # for example offline: use what was downloaded before
            return pathlib.Path(hub.snapshot_download(name, revision=revision or None, local_files_only=True))
        needed = _needed(sibling.rfilename for sibling in info.siblings)
        return pathlib.Path(hub.snapshot_download(name, revision=info.sha, allow_patterns=needed))
    except Exception as error:  # the hub's client raises errors of several libraries
        raise UserError(
            f"{source}: not a folder, and the Hugging Face hub did not return such a model: {error}"
        ) from error
