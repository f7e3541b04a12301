"""Exports targets and datastores as the reference implementation's Arrow streams, a few sequences at a time.

    targets     id_cnt int32, token_id list<int32>, prob list<float16>, label int32: one row per position
    datastore   keys fixed_size_list<float16>, vals int32: one row per position

Rows are the positions of a split in order.
"""

from __future__ import annotations

import pathlib

import jax
import ml_collections
import numpy as np
from etils import epath

from mlpmem_jax.core.artifacts import Artifact, open_artifact
from mlpmem_jax.core.errors import UserError, require
from mlpmem_jax.core.progress import progress, say
from mlpmem_jax.retrieval.targets_artifact import TargetsReader

_BATCH_POSITIONS = 4096  # approximate rows per record batch


def export_targets(config: ml_collections.ConfigDict, split: str, output: str) -> None:
    """Writes the targets of a split as an Arrow stream.

    Raises:
      UserError: the targets or their datastore are missing, or the output exists.
    """
    pa = require("pyarrow", extra="hub")
    targets, datastore = TargetsReader.open(config.workdir, split), _open_datastore(config, split)
    list_of = {"token_id": pa.list_(pa.int32()), "prob": pa.list_(pa.float16())}
    schema = pa.schema([("id_cnt", pa.int32()), *list_of.items(), ("label", pa.int32())])

    def batch(first: int, stop: int):
        offsets_N1, token_ids_M, probabilities_M = targets.read(first, stop)
        starts_N1 = pa.array(offsets_N1.astype(np.int32), pa.int32())
        return [
            pa.array(np.diff(offsets_N1).astype(np.int32)),
            pa.ListArray.from_arrays(starts_N1, pa.array(token_ids_M.astype(np.int32))),
            pa.ListArray.from_arrays(starts_N1, pa.array(probabilities_M)),
            pa.array(datastore.read("next_tokens", first, stop).ravel()),
        ]

    _write(output, schema, targets.sequences_per_shard, datastore, batch)


def export_datastore(config: ml_collections.ConfigDict, split: str, output: str) -> None:
    """Writes the keys and next tokens of a split as an Arrow stream.

    Raises:
      UserError: the datastore is missing, or the output exists.
    """
    pa = require("pyarrow", extra="hub")
    datastore = _open_datastore(config, split)
    width = datastore.arrays["keys"].shape[-1]
    schema = pa.schema([("keys", pa.list_(pa.float16(), width)), ("vals", pa.int32())])

    def batch(first: int, stop: int):
        keys = pa.array(datastore.read("keys", first, stop).astype(np.float16).ravel())
        return [
            pa.FixedSizeListArray.from_arrays(keys, width),
            pa.array(datastore.read("next_tokens", first, stop).ravel()),
        ]

    _write(output, schema, datastore.arrays["keys"].rows_per_shard, datastore, batch)


def _open_datastore(config: ml_collections.ConfigDict, split: str) -> Artifact:
    return open_artifact(epath.Path(config.workdir) / "datastore" / split, "datastore")


def _write(output: str, schema, per_shard: int, datastore: Artifact, batch) -> None:
    """Writes the record batches `batch(first, stop)` of all sequences, none of which spans two shards."""
    pa = require("pyarrow", extra="hub")
    file = pathlib.Path(output)
    if file.exists():
        raise UserError(f"--output={output}: already exists; delete it, or name another file")
    if jax.process_index():
        return
    sequences, length = datastore.arrays["next_tokens"].shape
    step = max(1, _BATCH_POSITIONS // length)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    with (
        progress(sequences * length, f"export: {file.name}", "positions") as bar,
        pa.OSFile(str(partial), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
    ):
        for shard in range(0, sequences, per_shard):
            end = min(shard + per_shard, sequences)
            for first in range(shard, end, step):
                stop = min(first + step, end)
                writer.write_batch(pa.record_batch(batch(first, stop), schema=schema))
                bar.advance((stop - first) * length)
    partial.replace(file)
    say(f"export: {file}")
