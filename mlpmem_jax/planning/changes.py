"""Changes to a config whose programs do not fit a chip's memory."""

from __future__ import annotations

from collections.abc import Iterator

import ml_collections

from mlpmem_jax.core.accelerators import Slice
from mlpmem_jax.core.config import check_config
from mlpmem_jax.core.errors import UserError
from mlpmem_jax.planning.planned import plan_stage

_SMALLEST_CHUNK, _MOST_TENSOR = 128, 16


def changes(config: ml_collections.ConfigDict, stage: str) -> Iterator[dict[str, object]]:
    """Changes to a config that reduce memory, cheapest first.

    Rematerializing blocks costs a third more of their FLOPs; smaller loss chunks make smaller matrix products, each
    micro-batch gathers the parameters once more, tensor parallelism moves activations. The later kinds of changes
    include remat and the smallest chunk.
    """
    change: dict[str, object] = {}
    if stage == "train":
        training = config.training
        if not training.remat:
            change = {"training.remat": True}
            yield change
        chunk = training.loss_chunk
        while chunk >= 2 * _SMALLEST_CHUNK:
            chunk //= 2
            yield {**change, "training.loss_chunk": chunk}
        if chunk < training.loss_chunk:
            change = {**change, "training.loss_chunk": chunk}
        steps = training.accumulation_steps
        while training.batch_sequences % (2 * steps) == 0:
            steps *= 2
            yield {**change, "training.accumulation_steps": steps}
    if stage == "datastore":
        sequences = config.datastore.batch_sequences
        while sequences > 1:
            sequences //= 2
            yield {"datastore.batch_sequences": sequences}
    if stage == "neighbors":
        rows = config.targets.key_shard_rows
        while rows > 1_000_000:
            rows //= 2
            yield {"targets.key_shard_rows": rows}
        return
    tensor = config.mesh.tensor
    while 0 < tensor < _MOST_TENSOR:
        tensor *= 2
        yield {**change, "mesh.tensor": tensor}


def changed(config: ml_collections.ConfigDict, change: dict[str, object]) -> ml_collections.ConfigDict:
    """The config with other values of some keys, "group.key".

    Raises:
      ConfigError: these values are incompatible.
    """
    other = config.copy_and_resolve_references()
    with other.unlocked():
        other.update_from_flattened_dict(change)
    check_config(other)
    return other


def smallest_change(
    config: ml_collections.ConfigDict, stage: str, tpu: Slice, devices: list, positions: int
) -> dict[str, object]:
    """The first of `changes` with which every program of the stage compiles, reduced to the necessary parts.

    Returns:
      Values by key, "group.key"; empty if no change is sufficient.
    """

    def fits(change: dict[str, object]) -> bool:
        try:
            programs = plan_stage(changed(config, change), stage, tpu, devices, positions)
        except UserError:  # the mesh does not divide the model that way
            return False
        return all(planned.roofline for planned in programs)

    change = next(filter(fits, changes(config, stage)), {})
    for key in list(change)[:-1]:
        smaller = {name: value for name, value in change.items() if name != key}
        change = smaller if fits(smaller) else change
    return change
