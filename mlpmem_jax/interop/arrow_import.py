"""Imports targets and datastores from the reference implementation's Arrow streams, one shard in memory at a time.

Rows are the positions of a split in order, as described in `arrow_export`. A stream may continue past the last whole
sequence; the rest is ignored.
"""

from __future__ import annotations

import jax
import ml_collections
import numpy as np
from etils import epath

from mlpmem_jax.core.artifacts import ArraySpec, Artifact, ArtifactWriter, find_finished, open_artifact
from mlpmem_jax.core.errors import ConfigError
from mlpmem_jax.core.mesh import barrier
from mlpmem_jax.core.progress import progress, say
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.corpus.tokens import TokenStream, num_sequences, read_sequences
from mlpmem_jax.interop.arrow_stream import Stream
from mlpmem_jax.models import saved, scoring
from mlpmem_jax.retrieval.datastore import block_at_depth, summary
from mlpmem_jax.retrieval.distribution import SparseDistributions
from mlpmem_jax.retrieval.targets_artifact import KIND, TargetsWriter, array_specs, folder_of

_MASS_TOLERANCE = 0.01  # tolerance of the sum of a row's probabilities, which are rounded to float16


def run(config: ml_collections.ConfigDict, split: str, source: str) -> Artifact:
    """Imports the datastore or the targets of a split from an Arrow stream, depending on its columns.

    Raises:
      UserError: the file is not such a stream, or a row does not match; names the row.
    """
    stream = Stream(source)
    make = _import_targets if stream.kind == "targets" else _import_datastore
    return make(config, split, stream)


def _first_wrong(is_wrong_N: np.ndarray) -> int | None:
    return int(np.argmax(is_wrong_N)) if is_wrong_N.any() else None


def _check_tokens(stream: Stream, first: int, found_N: np.ndarray, expected_N: np.ndarray, name: str) -> None:
    row = _first_wrong(found_N != expected_N)
    if row is not None:
        raise stream.error(
            first + row,
            f"{name} is {found_N[row]}, but the next token there is {expected_N[row]}; is this the same text, split "
            "and tokenizer?",
        )


def _shards(sequences: int, per_shard: int, length: int) -> list[int]:
    """The number of rows of every shard."""
    return [length * min(per_shard, sequences - first) for first in range(0, sequences, per_shard)]


def _import_targets(config: ml_collections.ConfigDict, split: str, stream: Stream) -> Artifact:
    datastore = open_artifact(epath.Path(config.workdir) / "datastore" / split, "datastore")
    tokens = open_artifact(epath.Path(config.workdir) / "tokens", "tokens")
    folder = folder_of(config.workdir, split)
    inputs = {f"datastore/{split}": datastore.fingerprint}
    if finished := find_finished(folder, KIND, stream.origin, inputs):
        say(f"targets/{split}: already imported")
        return finished
    spec = datastore.arrays["next_tokens"]
    sequences, length = spec.shape
    specs = array_specs(datastore, tokens.arrays["train"].dtype, config.targets.k)
    writer = TargetsWriter(folder, stream.origin, inputs, specs)
    incomplete = set(writer.incomplete_shards())
    with progress(sequences * length, f"import: targets/{split}", "positions") as bar:
        sizes = _shards(sequences, spec.rows_per_shard, length)
        for shard, (first, columns) in enumerate(stream.blocks(sizes)):
            start = shard * spec.rows_per_shard
            next_N = datastore.read("next_tokens", start, min(start + spec.rows_per_shard, sequences)).ravel()
            rows = _distributions(stream, first, columns, next_N, config.targets.k, tokens.summary["vocab_size"])
            if shard in incomplete and jax.process_index() == 0:
                writer.write_shard(shard, [rows])
            bar.advance(sizes[shard])
        stream.finish(length)
    if jax.process_index() == 0:
        writer.seal({"backend": "imported", "k": config.targets.k})
    barrier(f"targets {split} imported")
    return open_artifact(folder, KIND)


def _distributions(
    stream: Stream, first: int, columns: dict, next_N: np.ndarray, k: int, vocab_size: int
) -> SparseDistributions:
    """Checks and converts the rows of a block."""
    labels_N = stream.numbers(columns["label"], "int64", first)
    _check_tokens(stream, first, labels_N, next_N, "label")
    counts_N = stream.numbers(columns["id_cnt"], "int64", first)
    for name in ("token_id", "prob"):
        lengths_N = stream.numbers(columns[name].value_lengths(), "int64", first)
        if (row := _first_wrong(lengths_N != counts_N)) is not None:
            raise stream.error(first + row, f"{name} has {lengths_N[row]} entries, id_cnt says {counts_N[row]}")
    if (row := _first_wrong(counts_N > k)) is not None:
        raise stream.error(first + row, f"has {counts_N[row]} entries, more than config.targets.k, {k}; raise that")
    rows_M = np.repeat(np.arange(len(counts_N)), counts_N)
    ids_M = stream.numbers(columns["token_id"].flatten(), "int64", first)
    if (entry := _first_wrong((ids_M < 0) | (ids_M >= vocab_size))) is not None:
        raise stream.error(
            first + int(rows_M[entry]), f"token id {ids_M[entry]}; the vocabulary has {vocab_size} tokens"
        )
    probabilities_M = stream.numbers(columns["prob"].flatten(), "float32", first)
    if (entry := _first_wrong(~((probabilities_M >= 0) & (probabilities_M <= 1)))) is not None:
        raise stream.error(first + int(rows_M[entry]), f"{probabilities_M[entry]} is not a probability")
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
        dropped_mass_Q=np.zeros(len(counts_N), np.float32),
    )


def _import_datastore(config: ml_collections.ConfigDict, split: str, stream: Stream) -> Artifact:
    tokens = open_artifact(epath.Path(config.workdir) / "tokens", "tokens")
    sharding = Sharding.of(config)
    base, model, base_artifact = saved.load_language_model(epath.Path(config.workdir) / "base", sharding)
    if config.datastore.key_model or block_at_depth(model.blocks, config.datastore.input_depth) != model.blocks:
        raise ConfigError(
            "config.datastore: a reference datastore has only keys of the last block, which also serve as memory "
            "inputs; set input_depth to 1.0 and key_model to '', or run `mlpmem datastore`"
        )
    path = epath.Path(config.workdir) / "datastore" / split
    inputs = {"tokens": tokens.fingerprint, "base": base_artifact.fingerprint}
    if finished := find_finished(path, "datastore", stream.origin, inputs):
        say(f"datastore/{split}: already imported")
        return finished
    text, length = TokenStream(tokens, split), config.base.context_length
    sequences, per_shard, scored = num_sequences(text, length), config.datastore.sequences_per_shard, split != "train"
    writer = ArtifactWriter.create(
        path, "datastore", stream.origin, inputs, _specs(config, sequences, model.width, scored)
    )
    incomplete = set(writer.incomplete_shards())
    with progress(sequences * length, f"import: datastore/{split}", "positions") as bar:
        sizes = _shards(sequences, per_shard, length)
        for shard, (first, columns) in enumerate(stream.blocks(sizes)):
            count = sizes[shard] // length
            tokens_SxT, next_SxT, documents_SxT = read_sequences(text, shard * per_shard, count, length)
            vals_N = stream.numbers(columns["vals"], "int64", first)
            _check_tokens(stream, first, vals_N, next_SxT.ravel(), "vals")
            arrays = {"keys": _keys(stream, first, columns["keys"], model.width).reshape(count, length, -1)}
            arrays |= {"next_tokens": next_SxT, "documents": documents_SxT}
            if scored:  # a reference datastore lacks the base LM's scores
                arrays["base_log_probabilities"] = scoring.language_model_log_probabilities(
                    base, model, tokens_SxT, next_SxT, sharding=sharding
                )
            if shard in incomplete and jax.process_index() == 0:
                writer.write_shard(shard, arrays)
            bar.advance(sizes[shard])
        stream.finish(length)
    if jax.process_index() == 0:
        writer.seal(summary(sequences, length, model.width, input_block=model.blocks))
    barrier(f"datastore {split} imported")
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


def _keys(stream: Stream, first: int, column, width: int) -> np.ndarray:
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
