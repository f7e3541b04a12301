"""How arrays are sharded over devices: a mesh, and one table that maps logical array axes to mesh axes.

Every parameter and activation names its logical axes ("batch", "embed", "mlp", ...). `RULES` maps each of them to the
mesh axes that shard it; for another sharding strategy, set another table in `config.mesh.rules`. A `Sharding` combines
a mesh with such a table.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlpmem_jax.core.config import as_axes, mesh_rules
from mlpmem_jax.core.errors import ConfigError
from mlpmem_jax.core.mesh import AXES, make_mesh

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


class BatchPart(NamedTuple):
    """Which rows of a global batch this process provides.

    Attributes:
      index: index of the part, from 0.
      count: number of equal parts. Less than the number of processes if the devices of several processes hold the
        same rows because they share a `tensor` axis; these provide the same part.
      leads: True for the first of the processes that provide this part.
    """

    index: int
    count: int
    leads: bool


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A device mesh with a sharding table. Hashable, so that it can be a static argument of a jitted function.

    Attributes:
      mesh: the devices; None only in `LOCAL`.
      rules: logical axis -> the mesh axis, or axes, that shard it; None replicates it.
    """

    mesh: Mesh | None
    rules: Rules = dataclasses.field(default_factory=lambda: RULES, hash=False)

    @classmethod
    def of(cls, config: ml_collections.ConfigDict, devices: list | None = None) -> Sharding:
        """Creates the sharding of config.mesh; `devices` defaults to all devices.

        Raises:
          ConfigError: the mesh does not match the devices.
        """
        mesh = make_mesh(config.mesh.slice, config.mesh.fsdp, config.mesh.tensor, devices)
        return cls(mesh, mesh_rules(config))

    # Sharding whole arrays: the compiler inserts the collectives.

    def spec(self, *logical_axes: str | None) -> PartitionSpec:
        """The PartitionSpec of an array with these logical axes.

        Raises:
          ConfigError: an axis has no rule.
        """
        missing = [axis for axis in logical_axes if axis is not None and axis not in self.rules]
        if missing:
            raise ConfigError(
                f"config.mesh.rules: no rule for the logical axes {missing}; rules exist for {sorted(self.rules)}"
            )
        return PartitionSpec(*(None if axis is None else self.rules[axis] for axis in logical_axes))

    def named(self, *logical_axes: str | None) -> NamedSharding:
        """The NamedSharding of an array with these logical axes; without any, of a replicated array."""
        return NamedSharding(self.mesh, self.spec(*logical_axes))

    def rows(self, ndim: int) -> NamedSharding:
        """The NamedSharding of an array with `ndim` axes, of which the first is the batch."""
        return self.named("batch", *[None] * (ndim - 1))

    def tree(self, logical_axes, abstract=None):
        """A tree of NamedSharding.

        Args:
          logical_axes: tree whose leaves are tuples of logical axis names.
          abstract: tree of arrays or shapes of the same structure; if given, axes that are not divisible by their
            shards are replicated, such as the 25 heads of GPT-2 xl.
        """
        trees = (logical_axes,) if abstract is None else (logical_axes, abstract)
        return jax.tree.map(
            lambda axes, *array: self.named(*(self._dividing(axes, array[0].shape) if array else axes)),
            *trees,
            is_leaf=is_axes,
        )

    def _dividing(self, logical_axes: tuple[str | None, ...], shape: tuple[int, ...]) -> list[str | None]:
        """The logical axes, with None for those whose size is not divisible by their shards."""
        return [
            axis if axis is not None and size % self.size(as_axes(self.rules[axis])) == 0 else None
            for axis, size in zip(logical_axes, shape, strict=True)
        ]

    def check_divides(self, abstract, logical_axes) -> None:
        """Checks that the mesh divides every array of a tree into equal shards.

        Args:
          abstract: tree of arrays or shapes.
          logical_axes: tree of the same structure whose leaves are tuples of logical axis names.

        Raises:
          ConfigError: names the first array that is not divisible.
        """
        placed = jax.tree.leaves(self.tree(logical_axes))
        for (path, array), sharding in zip(jax.tree_util.tree_leaves_with_path(abstract), placed, strict=True):
            for size, axes in zip(array.shape, sharding.spec, strict=False):
                axes = as_axes(axes)
                if size % (shards := self.size(axes)):
                    name = "/".join(entry.key for entry in path)
                    raise ConfigError(
                        f"config.mesh: {'+'.join(axes)} makes {shards} shards, which do not divide an axis of {size} "
                        f"of {name} (shape {array.shape}); choose sizes that they divide, or other config.mesh.rules"
                    )

    @property
    def activations(self) -> NamedSharding | None:
        """The NamedSharding of hidden states [B, T, D]; None on a single device.

        Without this constraint the compiler may replicate the batch, and move hidden states rather than parameters.
        """
        return None if self.is_local else self.rows(3)

    # Programs with explicit collectives (`jax.shard_map`).

    @property
    def is_local(self) -> bool:
        """Whether all arrays are on a single device, so that no collectives are needed."""
        return self.mesh is None or self.mesh.size == 1

    def axes(self, logical_axis: str) -> tuple[str, ...]:
        """The mesh axes that shard a logical axis; empty on a single device, where collectives over () do nothing."""
        return () if self.is_local else as_axes(self.rules[logical_axis])

    def size(self, mesh_axes: tuple[str, ...]) -> int:
        """The number of shards over some mesh axes."""
        return math.prod(self.mesh.shape[axis] for axis in mesh_axes)

    def shards(self, logical_axis: str) -> int:
        """The number of shards of a logical axis."""
        return self.size(self.axes(logical_axis))

    def sequence_axes(self, positions: int, logical_axis: str) -> tuple[str, ...]:
        """The mesh axes of `logical_axis` if, after those of the batch, they divide the positions; else none.

        Computation per position is then sharded over the whole mesh (sequence parallelism).
        """
        return self.axes(logical_axis) if positions % (self.shards("batch") * self.shards(logical_axis)) == 0 else ()

    def check_collectives(self) -> None:
        """Checks that parameters can be gathered over "embed", and their products summed over "mlp" and "vocab".

        Raises:
          ConfigError: the rules do not allow it.
        """
        batch, embed, mlp, vocab = (self.axes(name) for name in ("batch", "embed", "mlp", "vocab"))
        if not set(embed) <= set(batch) or (set(mlp) | set(vocab)) & set(batch):
            raise ConfigError(
                f"config.mesh.rules: the axes of 'embed' {embed} must be among those of 'batch' {batch}, and those of "
                f"'mlp' {mlp} and 'vocab' {vocab} must not"
            )

    # Batches.

    @functools.cached_property
    def batch_part(self) -> BatchPart:
        """The part of every global batch that this process provides.

        Raises:
          ConfigError: the rows of two processes overlap without being the same.
        """
        shards = self.shards("batch")
        rows_by_process: dict[int, set[int]] = {}
        for device, (rows,) in self.named("batch").devices_indices_map((shards,)).items():
            rows_by_process.setdefault(device.process_index, set()).update(range(*rows.indices(shards)))
        parts = sorted({tuple(sorted(rows)) for rows in rows_by_process.values()})
        if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) != shards:
            raise ConfigError(
                f"config.mesh: slice x fsdp x tensor = {' x '.join(str(self.mesh.shape[axis]) for axis in AXES)} makes "
                f"{shards} shards of the batch, which overlap between {jax.process_count()} processes of "
                f"{jax.local_device_count()} devices; use a power of two for each size"
            )
        own = rows_by_process[jax.process_index()]
        first = min(process for process, rows in rows_by_process.items() if rows == own)
        return BatchPart(parts.index(tuple(sorted(own))), len(parts), first == jax.process_index())

    def global_batch(self, batch):
        """Builds a tree of global arrays, sharded along axis 0, from each process's part of the rows (NumPy arrays)."""
        return jax.tree.map(
            lambda rows: jax.make_array_from_process_local_data(self.rows(rows.ndim), rows),
            batch,
        )


LOCAL = Sharding(None, dict.fromkeys(RULES))
"""The sharding of arrays on a single device, as inside `jax.shard_map`."""


def is_axes(leaf) -> bool:
    """Whether a node is a leaf of a tree of logical axes: `is_leaf` of functions that map over one."""
    return isinstance(leaf, tuple)


def placed_shapes(abstract, shardings):
    """A tree of arrays or shapes as jax.ShapeDtypeStruct, with the shardings of another tree."""
    return jax.tree.map(
        lambda array, placed: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=placed), abstract, shardings
    )


def local_rows(array: jax.Array) -> np.ndarray:
    """This process's rows of an array that is sharded along axis 0 only, in order."""
    if jax.process_count() == 1:
        return np.asarray(array)
    shards = {shard.index[0].start or 0: shard for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])
