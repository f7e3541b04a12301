"""Targets and datastores as the reference implementation's Arrow streams, out and in, one shard in memory at a time.

targets     id_cnt int32, token_id list<int32>, prob list<float16>, label int32: a row for each position
datastore   keys fixed_size_list<float16>, vals int32: a row for each position

Rows are the positions of a split in order. A stream may go on past the last whole sequence; what follows is left out.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Iterator

import jax
import ml_collections
import numpy as np
from etils import epath

from mlpmem_jax.core import mesh as meshes
from mlpmem_jax.core.artifacts import ArraySpec, Artifact, ArtifactWriter, find_finished, open_artifact
from mlpmem_jax.core.errors import ConfigError, UserError, require
from mlpmem_jax.core.progress import progress, say
from mlpmem_jax.corpus.tokens import TokenStream, num_sequences, read_sequences
from mlpmem_jax.models import saved, scoring
from mlpmem_jax.retrieval.datastore import tapped_block
from mlpmem_jax.retrieval.distribution import SparseDistributions
from mlpmem_jax.retrieval.targets import array_specs
from mlpmem_jax.retrieval.tiles import Split

_BATCH_POSITIONS = 4096  # rows of one record batch that is written, about
_MASS_TOLERANCE = 0.01  # of the sum of a row's probabilities: each is rounded to float16
_COLUMNS = {"targets": ("id_cnt", "token_id", "prob", "label"), "datastore": ("keys", "vals")}


def export_targets(config: ml_collections.ConfigDict, split: str, output: str) -> None:
    """Writes the targets of a split as an Arrow stream.

    Raises:
      UserError: the targets or their datastore are missing, or the output exists.
    """
    pa = require("pyarrow", extra="hub")
    targets, datastore = (_open(config, kind, split) for kind in ("targets", "datastore"))
    list_of = {"token_id": pa.list_(pa.int32()), "prob": pa.list_(pa.float16())}
    schema = pa.schema([("id_cnt", pa.int32()), *list_of.items(), ("label", pa.int32())])

    def batch(first: int, stop: int):
        offsets_SxT1 = targets.read("offsets", first, stop)
        shard = first // targets.arrays["offsets"].rows_per_shard
        begin, end = int(offsets_SxT1[0, 0]), int(offsets_SxT1[-1, -1])
        starts_N1 = pa.array(np.append(offsets_SxT1[:, :-1], end).astype(np.int32) - begin, pa.int32())
        ids_M = targets.read_ragged("token_ids", shard, begin, end).astype(np.int32)
        probabilities_M = targets.read_ragged("probabilities", shard, begin, end)
        return [
            pa.array(np.diff(offsets_SxT1).astype(np.int32).ravel()),
            pa.ListArray.from_arrays(starts_N1, pa.array(ids_M)),
            pa.ListArray.from_arrays(starts_N1, pa.array(probabilities_M)),
            pa.array(datastore.read("next_tokens", first, stop).ravel()),
        ]

    _write(output, schema, targets.arrays["offsets"], datastore, batch)


def export_datastore(config: ml_collections.ConfigDict, split: str, output: str) -> None:
    """Writes the keys and next tokens of a split as an Arrow stream.

    Raises:
      UserError: the datastore is missing, or the output exists.
    """
    pa = require("pyarrow", extra="hub")
    datastore = _open(config, "datastore", split)
    width = datastore.arrays["keys"].shape[-1]
    schema = pa.schema([("keys", pa.list_(pa.float16(), width)), ("vals", pa.int32())])

    def batch(first: int, stop: int):
        keys = pa.array(datastore.read("keys", first, stop).astype(np.float16).ravel())
        return [
            pa.FixedSizeListArray.from_arrays(keys, width),
            pa.array(datastore.read("next_tokens", first, stop).ravel()),
        ]

    _write(output, schema, datastore.arrays["keys"], datastore, batch)


def _open(config: ml_collections.ConfigDict, kind: str, split: str) -> Artifact:
    return open_artifact(epath.Path(config.workdir) / kind / split, kind)


def _write(output: str, schema, spec: ArraySpec, datastore: Artifact, batch) -> None:
    """Writes the record batches `batch(first, stop)` of all sequences; none of them spans two shards."""
    pa = require("pyarrow", extra="hub")
    file = pathlib.Path(output)
    if file.exists():
        raise UserError(f"--output={output}: exists already; delete it, or name another file")
    if jax.process_index():
        return
    sequences, length = datastore.arrays["next_tokens"].shape
    step = max(1, _BATCH_POSITIONS // length)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    with progress(sequences * length, f"export: {file.name}", "positions") as bar:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for shard in range(0, sequences, spec.rows_per_shard):
                end = min(shard + spec.rows_per_shard, sequences)
                for first in range(shard, end, step):
                    stop = min(first + step, end)
                    writer.write_batch(pa.record_batch(batch(first, stop), schema=schema))
                    bar.advance((stop - first) * length)
    partial.replace(file)
    say(f"export: {file}")


def run_import(config: ml_collections.ConfigDict, split: str, source: str) -> Artifact:
    """Makes the datastore or the targets of a split from an Arrow stream; its columns tell which.

    Raises:
      UserError: the file is no such stream, or a row of it does not fit; the text names the row.
    """
    stream = _Stream(source)
    make = _import_targets if stream.kind == "targets" else _import_datastore
    return make(config, split, stream)


class _Stream:
    """An Arrow stream of one of the two kinds, read once from front to back."""

    def __init__(self, source: str):
        self._pa = require("pyarrow", extra="hub")
        self.source, self._row = source, 0
        try:
            self._file = self._pa.memory_map(source)
            self._reader = self._pa.ipc.open_stream(self._file)
        except (OSError, self._pa.ArrowInvalid) as error:
            raise UserError(f"{source}: expected an Arrow stream: {error}") from error
        names = set(self._reader.schema.names)
        found = [kind for kind, columns in _COLUMNS.items() if names >= set(columns)]
        if not found:
            expected = " or ".join(f"{', '.join(columns)} ({kind})" for kind, columns in _COLUMNS.items())
            raise UserError(f"{source}: has the columns {', '.join(sorted(names))}; expected {expected}")
        self.kind = found[0]
        self.origin = {"imported": {"file": pathlib.Path(source).name, "bytes": self._file.size()}}

    def error(self, row: int, text: str) -> UserError:
        return UserError(f"{self.source}: row {row}: {text}")

    def blocks(self, sizes: Iterable[int]) -> Iterator[tuple[int, dict]]:
        """(first row, columns by name) for consecutive blocks of so many rows."""
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
        """Reads what is left, which must be less than a sequence."""
        rest = self._left_over
        while rest < less_than:
            try:
                rest += len(self._reader.read_next_batch())
            except StopIteration:
                break
        if rest >= less_than:
            raise self.error(self._row, "and those after it are more than the tokens of this split")
        if rest:
            say(f"import: the last {rest} rows make no whole sequence, and are left out")

    def numbers(self, column, dtype: str, first: int) -> np.ndarray:
        """A column of numbers without nulls as an array."""
        if column.null_count:
            raise self.error(first + int(np.argmax(column.is_null().to_numpy(zero_copy_only=False))), "holds a null")
        return column.to_numpy(zero_copy_only=False).astype(dtype)


def _first_wrong(is_wrong_N: np.ndarray) -> int | None:
    return int(np.argmax(is_wrong_N)) if is_wrong_N.any() else None


def _check_tokens(stream: _Stream, first: int, found_N: np.ndarray, expected_N: np.ndarray, name: str) -> None:
    row = _first_wrong(found_N != expected_N)
    if row is not None:
        raise stream.error(
            first + row, f"{name} is {found_N[row]}, but the next token there is {expected_N[row]}; is this the same "
            "text, split and tokenizer?"
        )  # fmt: skip


def _shards(writer: ArtifactWriter, sequences: int, per_shard: int, length: int) -> list[int]:
    """Rows of every shard."""
    return [length * min(per_shard, sequences - shard * per_shard) for shard in range(writer.num_shards)]


def _import_targets(config: ml_collections.ConfigDict, split: str, stream: _Stream) -> Artifact:
    datastore = _open(config, "datastore", split)
    tokens = open_artifact(epath.Path(config.workdir) / "tokens", "tokens")
    path = epath.Path(config.workdir) / "targets" / split
    inputs = {f"datastore/{split}": datastore.fingerprint}
    if finished := find_finished(path, "targets", stream.origin, inputs):
        say(f"targets/{split}: imported already")
        return finished
    spec = datastore.arrays["next_tokens"]
    sequences, length = spec.shape
    token_dtype = "uint16" if tokens.arrays["train"].dtype == "uint16" else "int32"
    writer = ArtifactWriter.create(
        path, "targets", stream.origin, inputs, array_specs(datastore, config.targets.k, token_dtype)
    )
    making = Split(split, datastore, writer, path, token_dtype)
    incomplete = set(writer.incomplete_shards())
    with progress(sequences * length, f"import: targets/{split}", "positions") as bar:
        sizes = _shards(writer, sequences, spec.rows_per_shard, length)
        for shard, (first, columns) in enumerate(stream.blocks(sizes)):
            start = shard * spec.rows_per_shard
            next_N = datastore.read("next_tokens", start, start + spec.rows_per_shard).ravel()
            distributions = _distributions(stream, first, columns, next_N, config.targets.k, tokens.summary["vocab_size"])
            if shard in incomplete and jax.process_index() == 0:
                making.write(shard, [distributions], 0)
            bar.advance(sizes[shard])
        stream.finish(length)
    if jax.process_index() == 0:
        making.seal({"backend": "imported", "k": config.targets.k})
    meshes.barrier(f"targets {split} imported")
    return open_artifact(path, "targets")


def _distributions(
    stream: _Stream, first: int, columns: dict, next_N: np.ndarray, k: int, vocab_size: int
) -> SparseDistributions:
    """The rows of a block, checked."""
    labels_N = stream.numbers(columns["label"], "int64", first)
    _check_tokens(stream, first, labels_N, next_N, "label")
    counts_N = stream.numbers(columns["id_cnt"], "int64", first)
    for name in ("token_id", "prob"):
        lengths_N = stream.numbers(columns[name].value_lengths(), "int64", first)
        if (row := _first_wrong(lengths_N != counts_N)) is not None:
            raise stream.error(first + row, f"{name} has {lengths_N[row]} entries, id_cnt says {counts_N[row]}")
    if (row := _first_wrong(counts_N > k)) is not None:
        raise stream.error(
            first + row, f"has {counts_N[row]} entries, more than config.targets.k, {k}; set that to the k it was made with"
        )  # fmt: skip
    rows_M = np.repeat(np.arange(len(counts_N)), counts_N)
    ids_M = stream.numbers(columns["token_id"].flatten(), "int64", first)
    if (entry := _first_wrong((ids_M < 0) | (ids_M >= vocab_size))) is not None:
        raise stream.error(
            first + int(rows_M[entry]), f"token id {ids_M[entry]}; the vocabulary has {vocab_size} tokens"
        )
    probabilities_M = stream.numbers(columns["prob"].flatten(), "float32", first)
    if (entry := _first_wrong(~((probabilities_M >= 0) & (probabilities_M <= 1)))) is not None:
        raise stream.error(first + int(rows_M[entry]), f"{probabilities_M[entry]} is no probability")
    masses_N = np.bincount(rows_M, weights=probabilities_M, minlength=len(counts_N))
    if (row := _first_wrong((counts_N > 0) & (np.abs(masses_N - 1) > _MASS_TOLERANCE))) is not None:
        raise stream.error(first + row, f"its probabilities sum to {masses_N[row]:.4f}, expected 1")
    is_label_M = ids_M == labels_N[rows_M]
    return SparseDistributions(
        offsets_Q1=np.concatenate([[0], np.cumsum(counts_N)]),
        token_ids_M=ids_M.astype(np.int32),
        probabilities_M=probabilities_M,
        label_probabilities_Q=np.bincount(
            rows_M, weights=np.where(is_label_M, probabilities_M, 0), minlength=len(counts_N)
        ).astype(np.float32),
        cut_mass_Q=np.zeros(len(counts_N), np.float32),
    )


def _import_datastore(config: ml_collections.ConfigDict, split: str, stream: _Stream) -> Artifact:
    tokens = open_artifact(epath.Path(config.workdir) / "tokens", "tokens")
    mesh, rules = meshes.mesh_of(config)
    base, model, base_artifact = saved.load_language_model(epath.Path(config.workdir) / "base", mesh, rules)
    if config.datastore.key_model or tapped_block(model.blocks, config.datastore.input_depth) != model.blocks:
        raise ConfigError(
            "config.datastore: a reference datastore holds keys of the last block alone, and these serve as memory "
            "inputs too; set input_depth to 1.0 and key_model to '', or run `mlpmem datastore`"
        )
    path = epath.Path(config.workdir) / "datastore" / split
    inputs = {"tokens": tokens.fingerprint, "base": base_artifact.fingerprint}
    if finished := find_finished(path, "datastore", stream.origin, inputs):
        say(f"datastore/{split}: imported already")
        return finished
    text, length = TokenStream(tokens, split), config.base.context_length
    sequences, per_shard, scored = num_sequences(text, length), config.datastore.sequences_per_shard, split != "train"
    writer = ArtifactWriter.create(
        path, "datastore", stream.origin, inputs, _specs(config, sequences, model.width, scored)
    )
    incomplete = set(writer.incomplete_shards())
    with progress(sequences * length, f"import: datastore/{split}", "positions") as bar:
        sizes = _shards(writer, sequences, per_shard, length)
        for shard, (first, columns) in enumerate(stream.blocks(sizes)):
            count = sizes[shard] // length
            tokens_SxT, next_SxT, documents_SxT = read_sequences(text, shard * per_shard, count, length)
            vals_N = stream.numbers(columns["vals"], "int64", first)
            _check_tokens(stream, first, vals_N, next_SxT.ravel(), "vals")
            arrays = {"keys": _keys(stream, first, columns["keys"], model.width).reshape(count, length, -1)}
            arrays |= {"next_tokens": next_SxT, "documents": documents_SxT}
            if scored:  # a reference datastore does not keep what the base LM says
                arrays["base_log_probabilities"] = scoring.language_model_log_probabilities(
                    base, model, tokens_SxT, next_SxT, mesh=mesh, rules=rules
                )
            if shard in incomplete and jax.process_index() == 0:
                writer.write_shard(shard, arrays)
            bar.advance(sizes[shard])
        stream.finish(length)
    if jax.process_index() == 0:
        writer.seal({"sequences": sequences, "positions": sequences * length, "width": model.width})
    meshes.barrier(f"datastore {split} imported")
    return open_artifact(path, "datastore")


def _specs(config: ml_collections.ConfigDict, sequences: int, width: int, scored: bool) -> dict[str, ArraySpec]:
    length, per_shard = config.base.context_length, config.datastore.sequences_per_shard
    named = {"keys": (config.datastore.dtype, width), "next_tokens": ("int32",), "documents": ("int32",)}
    if scored:
        named["base_log_probabilities"] = ("float32",)
    return {
        name: ArraySpec((sequences, length, *widths), dtype, per_shard, (1, length, *widths))
        for name, (dtype, *widths) in named.items()
    }


def _keys(stream: _Stream, first: int, column, width: int) -> np.ndarray:
    """float16 [rows, width]."""
    lengths_N = np.full(len(column), column.type.list_size) if hasattr(column.type, "list_size") else None
    if lengths_N is None:
        lengths_N = stream.numbers(column.value_lengths(), "int64", first)
    if (row := _first_wrong(lengths_N != width)) is not None:
        raise stream.error(first + row, f"its key has {lengths_N[row]} numbers; the base's are {width} wide")
    keys_NxD = stream.numbers(column.flatten(), "float16", first).reshape(-1, width)
    if (row := _first_wrong(~np.isfinite(keys_NxD).all(axis=1))) is not None:
        raise stream.error(first + row, "its key is not finite")
    return keys_NxD
