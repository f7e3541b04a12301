"""An artifact's manifest, or the link to a folder that has one."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import posixpath
from collections.abc import Container, Mapping

from etils import epath

from mlpmem_jax.core import storage
from mlpmem_jax.core.errors import ArtifactError

FORMAT = "mlpmem_jax artifact"
VERSION = 1
MANIFEST = "manifest.json"
LINK = "link"
_LOCATIONS = {
    # Name of an input, with a checksum of its content -> the key of its path in the config of an artifact made from it.
    "files": ("corpus", "path"),
    "tokenizer": ("tokenizer", "path"),
    "weights": ("path",),
    "key_model": ("key_model",),
}


def absolute(path) -> str:
    """The absolute path, as TensorStore's file driver needs it; URLs are unchanged.

    Links are resolved: after one, ".." is the parent of its target, for everything that opens the path itself.
    """
    path = str(path).rstrip("/")
    return path if storage.is_remote(path) else os.path.realpath(path)


def link(path, target) -> None:
    """Makes the folder `path` a read-only link to the artifact at `target`, which need not exist yet.

    Raises:
      ArtifactError: the folder contains an artifact itself.
    """
    path, folder = absolute(path), epath.Path(path)
    if (folder / MANIFEST).exists():
        raise ArtifactError(f"{path}: holds an artifact, where a link to {target} is needed; delete that folder")
    folder.mkdir(parents=True, exist_ok=True)
    # Relative, so that both can be moved together.
    (folder / LINK).write_text(posixpath.relpath(absolute(target), path) + "\n")


def located(path) -> str:
    """The location of the artifact at `path`, following a link.

    Raises:
      ArtifactError: the link is damaged.
    """
    path = absolute(path)
    file = epath.Path(path) / LINK
    if not file.exists():
        return path
    target = file.read_bytes().decode(errors="replace").strip()
    if not target.isprintable() or "\ufffd" in target:
        raise ArtifactError(f"{file}: names no folder (edited or corrupt); delete it and run again what made it")
    scheme, separator, place = path.rpartition("://")
    return scheme + separator + posixpath.normpath(posixpath.join(place, target))


def fingerprint(manifest: Mapping) -> str:
    """SHA-256 of the manifest's content, except its own fingerprint."""
    content = {key: value for key, value in manifest.items() if key != "fingerprint"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def encode(content: Mapping) -> bytes:
    """Deterministic JSON of the content."""
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def read_manifest(path: str) -> dict | None:
    """The manifest of the artifact at `path`, sealed or not; None if there is none.

    Raises:
      ArtifactError: the file is not a manifest of this project, is of a newer version, or is corrupt.
    """
    file = epath.Path(path) / MANIFEST
    if not file.exists():
        return None
    try:
        manifest = json.loads(file.read_bytes())
    except ValueError as error:
        raise ArtifactError(f"{file}: not valid JSON ({error}); delete {path} and run its stage again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(f"{file}: expected a manifest with format {FORMAT!r}; this folder is not an artifact")
    version = manifest.get("version")
    if isinstance(version, int) and version > VERSION:  # checked first: its fingerprint may be computed differently
        raise ArtifactError(
            f"{file}: has version {version}, this installation reads up to {VERSION}; upgrade mlpmem_jax"
        )
    if fingerprint(manifest) != manifest.get("fingerprint"):
        raise ArtifactError(
            f"{file}: its content does not match its fingerprint (edited or corrupt); "
            f"restore it, or delete {path} and run its stage again"
        )
    return manifest


def is_sealed(path) -> bool:
    """Whether there is a finished artifact at `path`, following a link.

    Raises:
      ArtifactError: what is there is no artifact, or is damaged.
    """
    manifest = read_manifest(located(path))
    return manifest is not None and manifest["sealed"]


def _differences(stored, expected, prefix="") -> list[str]:
    """Human-readable differences between two trees of dictionaries."""
    if isinstance(stored, dict) and isinstance(expected, dict):
        return [
            line
            for key in sorted({*stored, *expected})
            for line in _differences(stored.get(key, "(absent)"), expected.get(key, "(absent)"), f"{prefix}{key}.")
        ]
    return [] if stored == expected else [f"{prefix[:-1]}: {stored!r} there, {expected!r} now"]


def _without_locations(origin: Mapping, identified: Container[str]) -> dict:
    """An origin without the paths of inputs that are identified by a checksum of their content: they may be moved."""
    origin = json.loads(json.dumps(origin))
    for name, (*groups, key) in _LOCATIONS.items():
        if name in identified:
            functools.reduce(lambda group, name: group.get(name, {}), groups, origin["config"]).pop(key, None)
    return origin


def check_same_origin(path: str, manifest: Mapping, kind: str, config: Mapping, inputs: Mapping) -> None:
    """Checks that the artifact at `path` is of this kind and was built with this config from these inputs.

    Raises:
      ArtifactError: it was not; names the differences.
    """
    expected = {"kind": kind, "config": config, "inputs": inputs}
    stored = {key: manifest[key] for key in expected}
    identified = {*stored["inputs"]} & {*inputs}
    if lines := _differences(*(_without_locations(origin, identified) for origin in (stored, expected))):
        by_time = any("times, " in line for line in lines)
        raise ArtifactError(
            f"{path}: was made by another config: {'; '.join(lines[:6])}{' ...' if len(lines) > 6 else ''}. "
            f"{'Copies of large files need the times of the originals (cp -p, rsync -a). ' if by_time else ''}"
            "Choose another config.workdir, restore these values, or delete that folder to make it again"
        )
