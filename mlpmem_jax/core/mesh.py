"""The device mesh, and the one table that maps logical array axes to mesh axes.

Every parameter and activation names its logical axes ("batch", "embed", "mlp", ...). `RULES` says over which mesh
axes each of them is sharded; another table, given in `config.mesh.rules`, is another sharding strategy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mlpmem_jax.core.config import mesh_rules
from mlpmem_jax.core.errors import ConfigError

AXES = ("slice", "fsdp", "tensor")
"""Mesh axes: data parallel between slices, fully sharded data parallel, tensor parallel."""

_BARRIER_TIMEOUT_MS = 7 * 24 * 3600 * 1000  # that a process died is noticed by its missing heartbeats, not by this

Rules = Mapping[str, str | tuple[str, ...] | None]
RULES: Rules = {
    "batch": ("slice", "fsdp"),
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "vocab": "tensor",
    "layers": None,
    "position": None,
}


def make_mesh(slice_: int = 1, fsdp: int = -1, tensor: int = 1, devices: list | None = None) -> Mesh:
    """A mesh of shape [slice, fsdp, tensor]; one of the sizes may be -1, meaning all remaining devices.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [slice_, fsdp, tensor]
    known = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) > 1 or len(devices) % known:
        raise ConfigError(
            f"config.mesh: slice x fsdp x tensor = {slice_} x {fsdp} x {tensor} does not fit {len(devices)} devices; "
            "at most one of the sizes may be -1, and the product must divide the number of devices"
        )
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if int(np.prod(sizes)) != len(devices):
        raise ConfigError(
            f"config.mesh: slice x fsdp x tensor = {' x '.join(map(str, sizes))} uses {int(np.prod(sizes))} of "
            f"{len(devices)} devices; set one of the sizes to -1 to use them all"
        )
    types = (AxisType.Auto,) * len(AXES)
    arranged = _on_wires(devices, sizes) if devices[0].platform == "tpu" else np.asarray(devices).reshape(sizes)
    return Mesh(arranged, AXES, axis_types=types)


def _on_wires(devices: list, sizes: list[int]) -> np.ndarray:
    """TPUs in an order in which neighbors on the mesh are neighbors on the wires.

    TPU slices are joined by the data-centre network alone, so only the mesh axis `slice` runs between them; it may cut
    each of them once more.
    """
    tpu_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if tpu_slices == 1:
        return mesh_utils.create_device_mesh(tuple(sizes), devices=devices, allow_split_physical_axes=True)
    if sizes[0] % tpu_slices:
        raise ConfigError(
            f"config.mesh.slice: {sizes[0]} is no multiple of the {tpu_slices} TPU slices; only this axis may run "
            "between slices"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (sizes[0] // tpu_slices, *sizes[1:]),
        (tpu_slices, 1, 1),
        devices=devices,
        allow_split_physical_axes=True,
    )


def compiler_options(mesh: Mesh) -> dict[str, bool]:
    """Options of the compiler for a train step on TPUs: collectives that run beside the products.

    By default v5e sums gradients while nothing else runs. v5p and v6e wait for every collective, unless their sparse
    cores do them; their compilers refuse v5e's options, and v4's knows neither.
    """
    kind = mesh.devices.flat[0].device_kind
    if kind in ("TPU v5 lite", "TPU v5e"):
        return {"xla_enable_async_all_reduce": True, "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True}
    if kind in ("TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e"):
        kinds = ("all_gather", "reduce_scatter", "all_reduce")
        return {f"xla_tpu_enable_sparse_core_collective_offload_{name}": True for name in kinds}
    return {}


def mesh_of(config: ml_collections.ConfigDict, devices: list | None = None) -> tuple[Mesh, Rules]:
    """The mesh and the sharding table that config.mesh asks for; `devices` are all there are, unless given.

    Raises:
      ConfigError: the mesh does not fit the devices.
    """
    return make_mesh(config.mesh.slice, config.mesh.fsdp, config.mesh.tensor, devices), mesh_rules(config)


def partition_spec(logical_axes: tuple[str | None, ...], rules: Rules = RULES) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes.

    Raises:
      ConfigError: an axis has no rule.
    """
    missing = [axis for axis in logical_axes if axis is not None and axis not in rules]
    if missing:
        raise ConfigError(f"config.mesh.rules: no rule for the logical axes {missing}; rules exist for {sorted(rules)}")
    return PartitionSpec(*(None if axis is None else rules[axis] for axis in logical_axes))


def sharding(mesh: Mesh, logical_axes: tuple[str | None, ...], rules: Rules = RULES) -> NamedSharding:
    """The NamedSharding of an array with these logical axes."""
    return NamedSharding(mesh, partition_spec(logical_axes, rules))


def shardings(mesh: Mesh, tree, rules: Rules = RULES):
    """A tree of NamedSharding from a tree whose leaves are tuples of logical axis names."""
    return jax.tree.map(lambda axes: sharding(mesh, axes, rules), tree, is_leaf=lambda leaf: isinstance(leaf, tuple))


def _mesh_axes(rule: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that a rule, or an entry of a PartitionSpec, names."""
    return (rule,) if isinstance(rule, str) else tuple(rule or ())


def check_cuts(abstract, placed) -> None:
    """Checks that the mesh cuts every array of a tree in equal parts.

    Args:
      abstract: tree of arrays or shapes.
      placed: tree of NamedSharding of the same structure.

    Raises:
      ConfigError: naming the first array that it does not.
    """
    arrays = jax.tree_util.tree_leaves_with_path(abstract)
    for (path, array), cut in zip(arrays, jax.tree.leaves(placed), strict=True):
        for size, axes in zip(array.shape, cut.spec, strict=False):
            axes = _mesh_axes(axes)
            if size % (parts := math.prod(cut.mesh.shape[axis] for axis in axes)):
                name = "/".join(entry.key for entry in path)
                raise ConfigError(
                    f"config.mesh: {'+'.join(axes)} cuts in {parts} parts, but {name} has {size} in an axis that it "
                    f"cuts (shape {array.shape}); choose sizes that divide it, or other config.mesh.rules"
                )


class Cut(NamedTuple):
    """How the arrays of a training step are cut, for programs that name their own collectives.

    Attributes:
      mesh: the devices; None of a single one.
      batch, embed, mlp, vocab: mesh axes that cut the logical axis of that name.
    """

    mesh: Mesh | None
    batch: tuple[str, ...]
    embed: tuple[str, ...]
    mlp: tuple[str, ...]
    vocab: tuple[str, ...]

    def parts(self, axes: tuple[str, ...]) -> int:
        """Into how many parts some mesh axes cut."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def position_axes(self, positions: int, beside: tuple[str, ...]) -> tuple[str, ...]:
        """Of the axes `beside` those of the batch, all where they cut so many positions in equal parts, else none."""
        return beside if positions % self.parts(self.batch + beside) == 0 else ()

    def spec(self, logical_axes: tuple[str | None, ...]) -> PartitionSpec:
        """The PartitionSpec of an array with these logical axes; axes other than the four are not cut."""
        named = self._asdict()
        return PartitionSpec(*(named.get(axis) or None for axis in logical_axes))


def cut(mesh: Mesh, rules: Rules = RULES) -> Cut | None:
    """The cut that rules make on a mesh; None on a single device.

    Raises:
      ConfigError: parameters are cut along axes along which their products cannot be gathered or summed.
    """
    if mesh.size == 1:
        return None
    batch, embed, mlp, vocab = (_mesh_axes(rules[name]) for name in ("batch", "embed", "mlp", "vocab"))
    if not set(embed) <= set(batch) or (set(mlp) | set(vocab)) & set(batch):
        raise ConfigError(
            f"config.mesh.rules: the axes of 'embed' {embed} must be among those of 'batch' {batch}, and those of "
            f"'mlp' {mlp} and 'vocab' {vocab} must not"
        )
    return Cut(mesh, batch, embed, mlp, vocab)


def batch_shards(mesh: Mesh, rules: Rules = RULES) -> int:
    """Into how many parts the batch axis is cut."""
    return math.prod(mesh.shape[axis] for axis in _mesh_axes(rules["batch"]))


class BatchPart(NamedTuple):
    """Which rows of a global batch this process gives.

    Attributes:
      index: of the part, from 0.
      count: number of parts, all of the same size. Less than the number of processes where the devices of several
        hold the same rows, as those do that share a `tensor` axis: they give the same part.
      leads: True in the first of the processes that give this part.
    """

    index: int
    count: int
    leads: bool


def batch_part(mesh: Mesh, rules: Rules = RULES) -> BatchPart:
    """The part of every global batch that this process gives.

    Raises:
      ConfigError: the mesh gives some processes other rows than the rest, but not others altogether.
    """
    shards = batch_shards(mesh, rules)
    rows_by_process: dict[int, set[int]] = {}
    for device, (rows,) in sharding(mesh, ("batch",), rules).devices_indices_map((shards,)).items():
        rows_by_process.setdefault(device.process_index, set()).update(range(*rows.indices(shards)))
    parts = sorted({tuple(sorted(rows)) for rows in rows_by_process.values()})
    if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) != shards:
        raise ConfigError(
            f"config.mesh: slice x fsdp x tensor = {' x '.join(str(mesh.shape[axis]) for axis in AXES)} cuts the batch "
            f"in {shards} parts that {jax.process_count()} processes of {jax.local_device_count()} devices overlap "
            "in; take a power of two for each size"
        )
    mine = rows_by_process[jax.process_index()]
    first = min(process for process, rows in rows_by_process.items() if rows == mine)
    return BatchPart(parts.index(tuple(sorted(mine))), len(parts), first == jax.process_index())


def global_batch(mesh: Mesh, batch, rules: Rules = RULES):
    """A tree of global arrays, sharded along axis 0, from each process's own part of the rows (NumPy arrays)."""

    def place(rows):
        axes = ("batch",) + (None,) * (rows.ndim - 1)
        return jax.make_array_from_process_local_data(sharding(mesh, axes, rules), rows)

    return jax.tree.map(place, batch)


def local_rows(array: jax.Array) -> np.ndarray:
    """This process's part of the rows of an array that is sharded along axis 0 alone, in order."""
    if jax.process_count() == 1:
        return np.asarray(array)
    shards = {shard.index[0].start or 0: shard for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])


def barrier(name: str) -> None:
    """Waits until every process of the job is here; another's work may take days.

    This asks the job's coordinator, not the devices: a collective would give up on a process that comes late.

    Raises:
      JaxRuntimeError: a process died meanwhile.
    """
    if jax.process_count() == 1:
        return
    import orbax.checkpoint as ocp  # slow to import, and of use to several processes alone

    ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=_BARRIER_TIMEOUT_MS)
