"""Artifacts: directories of TensorStore arrays and one manifest, written shard by shard, readable once sealed.

    DIRECTORY/
      manifest.json        origin, contents, checksums; written last, when the artifact is sealed
      shards/000012.json   one small record per complete shard; merged into the manifest when it is sealed
      ARRAY/               a zarr3 array, split along axis 0 into shards, one file each
      FILE                 small side files, such as a tokenizer

A shard's record is written only after its data is durable, so a killed stage redoes only incomplete
shards. Nothing that varies between runs (times, hosts, process counts) is stored: a restarted stage produces the same
bytes. Every inner chunk has a CRC-32C that TensorStore checks at each read.

Any location that TensorStore can address works: a local path, gs://bucket/path, s3://bucket/path.

A folder may refer to an artifact in another working directory: it then has a single file, `link`, with the path. Object
stores have no symbolic links, and artifacts are too large to copy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np
import tensorstore as ts
from etils import epath

from mlpmem_jax.core import storage
from mlpmem_jax.core.errors import ArtifactError
from mlpmem_jax.core.manifests import (
    FORMAT,
    MANIFEST,
    VERSION,
    absolute,
    check_same_origin,
    encode,
    fingerprint,
    located,
    read_manifest,
)

_LIBRARIES = ("jax", "numpy", "tensorstore", "tokenizers", "scann")


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """One array of an artifact.

    Attributes:
      shape: global shape. Axis 0 is split into shards of `rows_per_shard`.
      dtype: NumPy name, or "bfloat16".
      rows_per_shard: rows of axis 0 per shard, which one process writes completely.
      read_chunk: shape of the chunk that one range read fetches; it divides the shard's shape.

    An array of shape [number of shards, capacity] with `rows_per_shard` 1 may be ragged: a shard then stores any
    number of entries up to the capacity, and unused capacity takes no space.
    """

    shape: tuple[int, ...]
    dtype: str
    rows_per_shard: int
    read_chunk: tuple[int, ...]

    @property
    def num_shards(self) -> int:
        return -(-self.shape[0] // self.rows_per_shard)

    def to_json(self) -> dict:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, fields: Mapping) -> ArraySpec:
        return cls(tuple(fields["shape"]), fields["dtype"], fields["rows_per_shard"], tuple(fields["read_chunk"]))


def _open_array(path: str, name: str, spec: ArraySpec, create: bool) -> ts.TensorStore:
    shard_shape = (spec.rows_per_shard, *spec.shape[1:])
    # A zarr3 shard must be a whole number of inner chunks.
    shard_shape = tuple(-(-size // chunk) * chunk for size, chunk in zip(shard_shape, spec.read_chunk, strict=True))
    codecs: list[dict] = [{"name": "bytes", "configuration": {"endian": "little"}}]
    if np.issubdtype(np.dtype(spec.dtype), np.integer):  # floating-point rows hardly compress, token ids do
        codecs.append({"name": "zstd", "configuration": {"level": 1}})
    codecs.append({"name": "crc32c"})
    store = {
        "driver": "zarr3",
        "kvstore": storage.kvstore_spec(f"{path}/{name}"),
        "metadata": {  # what is written, and what an array that is opened must have: nothing else guards its metadata
            "shape": list(spec.shape),
            "data_type": spec.dtype,
            "fill_value": 0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shard_shape)}},
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {"chunk_shape": list(spec.read_chunk), "codecs": codecs},
                }
            ],
        },
    }
    return ts.open(store, create=create, open=True).result()


class Artifact:
    """A sealed artifact, open for reading. Make one with `open_artifact`."""

    def __init__(self, path: str, manifest: Mapping):
        self.path = path
        self.kind: str = manifest["kind"]
        self.config: dict = manifest["config"]
        self.inputs: dict = manifest["inputs"]
        self.summary: dict = manifest["summary"]
        self.fingerprint: str = manifest["fingerprint"]
        self.arrays = {name: ArraySpec.from_json(fields) for name, fields in manifest["arrays"].items()}
        self._shards: list[dict] = manifest["shards"]
        self._files: dict[str, str] = manifest["files"]
        self._stores: dict[str, ts.TensorStore] = {}

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of all shard files and side files, including directories of parameters."""
        return storage.folder_bytes(epath.Path(self.path))

    @property
    def is_imported(self) -> bool:
        """Whether it was imported rather than built by a stage."""
        return "imported" in self.config

    def check_made_from(self, inputs: Mapping[str, Artifact]) -> None:
        """Checks that this artifact was built from exactly these artifacts.

        Args:
          inputs: artifacts by their names in the manifest; an imported artifact need not name them all.

        Raises:
          ArtifactError: it was built from another one; names both folders.
        """
        for name, artifact in inputs.items():
            if name not in self.inputs and self.is_imported:
                continue
            if self.inputs.get(name) != artifact.fingerprint:
                raise ArtifactError(
                    f"{self.path}: was made from another {artifact.kind} than the one at {artifact.path}; restore that "
                    f"one, or delete {self.path} and run its stage again"
                )

    def shard_length(self, name: str, shard: int) -> int:
        """Number of entries in a shard of a ragged array."""
        return self._shards[shard]["arrays"][name]["shape"][-1]

    def _store(self, name: str) -> ts.TensorStore:
        if name not in self._stores:
            try:
                self._stores[name] = _open_array(self.path, name, self.arrays[name], create=False)
            except ValueError as error:
                raise self._corrupt(name, error) from error
        return self._stores[name]

    def _corrupt(self, name: str, error: Exception) -> ArtifactError:
        return ArtifactError(
            f"{self.path}/{name}: could not be read back: {str(error).split(' [')[0]}. The data are corrupt or "
            f"incomplete; delete {self.path} and rerun the stage that builds it"
        )

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start to stop of axis 0.

        Raises:
          ArtifactError: the stored bytes do not match their checksum, or are missing.
        """
        try:
            return self._store(name)[start:stop].read().result()
        except ValueError as error:
            raise self._corrupt(name, error) from error

    def read_rows(self, name: str, rows_R: np.ndarray) -> np.ndarray:
        """Rows of axis 0 in any order, all read at the same time.

        Raises:
          ArtifactError: the stored bytes do not match their checksum, or are missing.
        """
        try:
            return self._store(name)[rows_R].read().result()
        except ValueError as error:
            raise self._corrupt(name, error) from error

    def read_ragged(self, name: str, shard: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Entries start to stop of one shard of a ragged array.

        Raises:
          ArtifactError: the stored bytes do not match their checksum, or are missing.
        """
        length = self.shard_length(name, shard)
        return self.read_ranges(name, [(shard, start, length if stop is None else min(stop, length))])[0]

    def read_ranges(self, name: str, ranges: Iterable[tuple[int, int, int]]) -> list[np.ndarray]:
        """The entries of each range (shard, start, stop) of a ragged array, all read at the same time.

        Raises:
          ArtifactError: the stored bytes do not match their checksum, or are missing.
        """
        store = self._store(name)
        try:
            reads = [store[shard, start:stop].read() for shard, start, stop in ranges]
            return [read.result() for read in reads]
        except ValueError as error:
            raise self._corrupt(name, error) from error

    def read_file(self, name: str) -> bytes:
        """A side file, checked against the manifest.

        Raises:
          ArtifactError: it is missing or differs from what was written.
        """
        file = epath.Path(self.path) / name
        content = file.read_bytes() if file.exists() else b""
        if hashlib.sha256(content).hexdigest() != self._files.get(name):
            raise ArtifactError(
                f"{file}: is missing, or was changed after it was written; delete {self.path} and run the "
                "stage that makes it again"
            )
        return content

    def check_sizes(self) -> None:
        """Checks the size of every shard file against the manifest.

        Raises:
          ArtifactError: a file is missing or truncated.
        """
        for index, shard in enumerate(self._shards):
            for name, record in shard["arrays"].items():
                if (stored := _shard_bytes(self.path, name, self.arrays[name], index)) != record["bytes"]:
                    raise ArtifactError(
                        f"{_shard_file(self.path, name, self.arrays[name], index)}: expected {record['bytes']} bytes, "
                        f"found {stored}; delete {self.path} and rerun the stage that builds it"
                    )


def _shard_file(path: str, name: str, spec: ArraySpec, shard: int) -> epath.Path:
    return epath.Path(path) / name / "c" / "/".join([str(shard)] + ["0"] * (len(spec.shape) - 1))


def _shard_bytes(path: str, name: str, spec: ArraySpec, shard: int) -> int:
    file = _shard_file(path, name, spec, shard)
    return storage.state_of(file).length if file.exists() else 0  # a shard of zeros has no file


class ArtifactWriter:
    """Writes an artifact, or resumes an unfinished one. Make one with `ArtifactWriter.create`."""

    def __init__(self, path: str, manifest: dict):
        self.path = path
        self.kind: str = manifest["kind"]
        self._manifest = manifest
        self._specs = {name: ArraySpec.from_json(fields) for name, fields in manifest["arrays"].items()}
        self._kvstore = ts.KvStore.open(storage.kvstore_spec(path)).result()
        self._stores: dict[str, ts.TensorStore] = {}

    @classmethod
    def create(
        cls, path, kind: str, config: Mapping, inputs: Mapping[str, str], arrays: Mapping[str, ArraySpec]
    ) -> ArtifactWriter:
        """Starts an artifact, or opens an unfinished one with the same config.

        Args:
          path: directory, local or in an object store.
          kind: kind of artifact, e.g. "datastore".
          config: the part of the resolved config that its content depends on.
          inputs: fingerprints of the artifacts it is built from, by name.
          arrays: its arrays; all must have the same number of shards.

        Raises:
          ArtifactError: the directory contains something else, or was written with another config.
        """
        path = absolute(path)
        if len({spec.num_shards for spec in arrays.values()}) > 1:
            raise ValueError(f"arrays of {path} differ in their number of shards")
        # Listed before reading the manifest: another process of the job may be writing it, and then the other files.
        names = [entry.name for entry in epath.Path(path).iterdir()] if epath.Path(path).exists() else []
        manifest = read_manifest(path)
        if manifest is None:
            if any(MANIFEST not in name for name in names):
                raise ArtifactError(
                    f"{path}: is not empty and has no {MANIFEST}; restore or delete it if it was an artifact, else "
                    "choose another config.workdir"
                )
            manifest = {
                "format": FORMAT,
                "version": VERSION,
                "kind": kind,
                "sealed": False,
                "config": json.loads(json.dumps(config)),
                "inputs": dict(inputs),
                "arrays": {name: spec.to_json() for name, spec in arrays.items()},
            }
            manifest["fingerprint"] = fingerprint(manifest)
            writer = cls(path, manifest)
            writer._write(MANIFEST, encode(manifest))
            return writer
        check_same_origin(path, manifest, kind, config, inputs)
        if manifest["sealed"]:
            raise ArtifactError(f"{path}: is already sealed; nothing may be written to it")
        return cls(path, manifest)

    @property
    def num_shards(self) -> int:
        return max((spec.num_shards for spec in self._specs.values()), default=0)

    def _write(self, name: str, content: bytes) -> None:
        try:
            self._kvstore.write(name, content).result()
        except (ValueError, OSError) as error:
            raise self._write_error(name, error) from error

    def _write_error(self, name: str, error: Exception) -> ArtifactError:
        return ArtifactError(
            f"{self.path}/{name}: could not be written: {str(error).split(' [')[0]}. Completed work is kept: "
            "free some space (or fix access) and run the same command again"
        )

    def incomplete_shards(self) -> list[int]:
        """Indices of the shards that are not yet durable, in order."""
        folder = epath.Path(self.path) / "shards"
        complete = {int(file.stem) for file in folder.iterdir() if file.suffix == ".json"} if folder.exists() else set()
        return [index for index in range(self.num_shards) if index not in complete]

    def shard_records(self) -> list[dict]:
        """The record of each shard: its `arrays`, and the writer's `extra`.

        Raises:
          ArtifactError: shards are incomplete, or a record is damaged.
        """
        if missing := self.incomplete_shards():
            raise ArtifactError(f"{self.path}: shards {missing[:8]} are incomplete; run its stage again")
        records = []
        for index in range(self.num_shards):
            file = epath.Path(self.path) / "shards" / f"{index:06d}.json"
            try:
                records.append(json.loads(file.read_bytes()))
            except ValueError as error:
                raise ArtifactError(f"{file}: not valid JSON ({error}); delete it and run the same command") from error
        return records

    def write_shard(self, index: int, arrays: Mapping[str, np.ndarray], extra: Mapping | None = None) -> None:
        """Writes one shard of every array and returns when it is durable.

        Args:
          index: index of the shard.
          arrays: the rows of this shard, by array name; [1, entries] for a ragged array.
          extra: small JSON values to store with the shard.

        Raises:
          ArtifactError: it could not be written, for instance because the disk is full.
        """
        if set(arrays) != set(self._specs):
            raise ValueError(f"shard needs the arrays {sorted(self._specs)}, got {sorted(arrays)}")
        pending, records = [], {}
        try:
            for name, rows in arrays.items():
                spec = self._specs[name]
                if name not in self._stores:
                    self._stores[name] = _open_array(self.path, name, spec, create=True)
                start = index * spec.rows_per_shard
                rows = np.ascontiguousarray(rows, dtype=np.dtype(spec.dtype))
                expected = min(spec.rows_per_shard, spec.shape[0] - start)
                if len(rows) != expected or rows.ndim != len(spec.shape):
                    raise ValueError(f"{name}: shard {index} is {rows.shape}, expected {expected} rows of {spec}")
                if rows.size:
                    region = self._stores[name][start : start + len(rows)]
                    region = region[:, : rows.shape[1]] if rows.ndim == 2 else region
                    pending.append(region.write(rows))
                digest = hashlib.sha256(rows.reshape(-1).view(np.uint8)).hexdigest()
                records[name] = {"checksum": digest, "shape": list(rows.shape)}
            for future in pending:
                future.result()
        except (ValueError, OSError) as error:
            if not pending:
                raise
            raise self._write_error(f"shard {index}", error) from error
        for name, record in records.items():
            record["bytes"] = _shard_bytes(self.path, name, self._specs[name], index)
        self._write(f"shards/{index:06d}.json", encode({"arrays": records, "extra": dict(extra or {})}))

    def write_file(self, name: str, content: bytes) -> None:
        """Writes a small side file durably; it is checksummed when the artifact is sealed."""
        self._write(name, content)

    def seal(self, summary: Mapping, files: tuple[str, ...] = ()) -> Artifact:
        """Makes the artifact readable. Call it in one process, once every shard is complete.

        Args:
          summary: metrics of the content; JSON values that do not vary between runs.
          files: names of its side files.

        Raises:
          ArtifactError: shards are incomplete, or the record of one is damaged.
        """
        manifest = {
            **self._manifest,
            "sealed": True,
            "shards": self.shard_records(),
            "files": {name: hashlib.sha256((epath.Path(self.path) / name).read_bytes()).hexdigest() for name in files},
            "summary": json.loads(json.dumps(summary)),
            "libraries": library_versions(_LIBRARIES),
        }
        manifest["fingerprint"] = fingerprint(manifest)
        self._write(MANIFEST, encode(manifest))
        _remove_shard_records(self.path)
        return Artifact(self.path, manifest)


def library_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Installed versions by package name; missing packages are omitted."""
    stored = {}
    for name in names:
        try:
            stored[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return stored


def _remove_shard_records(path: str) -> None:
    folder = epath.Path(path) / "shards"
    if folder.exists():
        with contextlib.suppress(FileNotFoundError):  # another process of the job may remove them too
            folder.rmtree()


def open_artifact(path, kind: str) -> Artifact:
    """Opens a sealed artifact.

    Raises:
      ArtifactError: it is missing, unfinished, corrupt, truncated, newer, or of another kind.
    """
    path = located(path)
    manifest = read_manifest(path)
    if manifest is None:
        raise ArtifactError(f"{path}: expected a finished {kind!r} artifact, found none; run the stage that builds it")
    if manifest["kind"] != kind:
        raise ArtifactError(f"{path}: expected an artifact of kind {kind!r}, found {manifest['kind']!r}")
    if not manifest["sealed"]:
        raise ArtifactError(f"{path}: is unfinished; run its stage again, it resumes where it stopped")
    artifact = Artifact(path, manifest)
    artifact.check_sizes()
    return artifact


def find_finished(path, kind: str, config: Mapping, inputs: Mapping[str, str]) -> Artifact | None:
    """The sealed artifact at `path` if it was built with this config and these inputs; None if it is not finished.

    An imported artifact has no config: it only has to match the inputs that it names.

    Raises:
      ArtifactError: the existing artifact was built with another config, or is damaged.
    """
    own, path = absolute(path), located(path)
    manifest = read_manifest(path)
    if path != own and (manifest is None or not manifest["sealed"]):
        raise ArtifactError(f"{path}: is unfinished, and {own} is a link to it; run the stage that makes it there")
    if manifest is None:
        return None
    if "imported" in manifest["config"] and "imported" not in config:
        config = manifest["config"]
        inputs = {name: inputs.get(name, "(absent)") for name in manifest["inputs"]}
    check_same_origin(path, manifest, kind, config, inputs)
    if not manifest["sealed"]:
        return None
    _remove_shard_records(path)  # left over if killed between sealing and cleanup
    return open_artifact(path, kind)
