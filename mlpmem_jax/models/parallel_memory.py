"""The memory's forward pass over a device mesh, with explicit collectives instead of the compiler's.

The residual stream is sharded by position over the whole mesh. Each block gathers its parameters over the axes of
"embed" (fully sharded data parallelism) and its positions over those of "mlp" (tensor parallelism), both in the compute
dtype, and scatters the sums of its outputs. Gradients take the same paths in reverse: they are scattered, not summed on
every device.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mlpmem_jax.core.errors import ConfigError
from mlpmem_jax.core.sharding import Sharding, is_axes
from mlpmem_jax.models import memory, modules
from mlpmem_jax.models.memory import Block, MemoryConfig

_MOST_UNROLLED = 9
"""Maximum blocks per loop iteration: within one, compilers gather a block's parameters while another block computes.
All iterations have equally many blocks, because a smaller last one would copy everything saved for the backward pass.
"""


def hidden(
    parameters: dict,
    config: MemoryConfig,
    inputs_BxD: jax.Array,
    *,
    sharding: Sharding,
    compute_dtype: jax.typing.DTypeLike = jnp.float32,
    remat: bool = False,
) -> jax.Array:
    """`memory.hidden` for inputs [positions, input_width] and parameters on a mesh.

    Raises:
      ConfigError: the mesh does not divide the positions, or its rules do not allow these collectives.
    """
    if sharding.is_local:
        return memory.hidden(parameters, config, inputs_BxD, compute_dtype=compute_dtype, remat=remat)
    positions = inputs_BxD.shape[0]
    if positions % (shards := sharding.shards("batch")):
        raise ConfigError(
            f"config.mesh: {positions} positions cannot be divided into {shards} equal shards over "
            f"{'+'.join(sharding.axes('batch'))}"
        )
    sharding.check_collectives()
    parameters = {name: tree for name, tree in parameters.items() if name != "lm_head"}
    logical = {name: axes for name, axes in memory.logical_axes(config).items() if name != "lm_head"}
    sequence_axes = sharding.sequence_axes(positions, "mlp")
    stream = PartitionSpec(sharding.axes("batch") + sequence_axes)

    def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
        return PartitionSpec(*(sharding.axes(axis) if axis in ("embed", "mlp") else None for axis in axes))

    return jax.shard_map(
        functools.partial(_local_hidden, config, compute_dtype, remat, sharding, logical, sequence_axes),
        mesh=sharding.mesh,
        in_specs=(jax.tree.map(spec, logical, is_leaf=is_axes), stream),
        out_specs=stream,
        check_vma=False,  # JAX cannot track replication through the sums of outputs over "mlp"
    )(parameters, inputs_BxD)


def _local_hidden(
    config: MemoryConfig, compute_dtype, remat, sharding: Sharding, logical, sequence_axes, parameters, inputs_BxD
):
    """The computation of one device, from its shards of parameters (with `logical` axes) and its positions."""
    mlp_axes, embed_axes = sharding.axes("mlp"), sharding.axes("embed")

    def gather(axes: tuple[str | None, ...], array: jax.Array) -> jax.Array:
        if "embed" not in axes:
            return array
        return jax.lax.all_gather(array.astype(compute_dtype), embed_axes, axis=axes.index("embed"), tiled=True)

    def gather_block(block: dict) -> dict:
        """A block's parameters, gathered along "embed"; only one of the summed outputs gets the bias."""
        # Stacked parameters have a first axis "layers" that those of one block lack.
        block = jax.tree.map(lambda axes, array: gather(axes[1:], array), logical["h"], block, is_leaf=is_axes)
        if config.family == "llama":
            return block
        output = block["mlp"]["c_proj"]
        bias = jnp.where(jax.lax.axis_index(mlp_axes) == 0, output["bias"], 0)
        return {**block, "mlp": {**block["mlp"], "c_proj": {**output, "bias": bias}}}

    def call_block(block: Block, x_BxD: jax.Array) -> jax.Array:
        y_BxD = jax.lax.all_gather(block.norm(x_BxD).astype(compute_dtype), sequence_axes, axis=0, tiled=True)
        y_BxD = jax.lax.psum_scatter(block.mlp(y_BxD), sequence_axes, scatter_dimension=0, tiled=True)
        return x_BxD + (y_BxD if sequence_axes else jax.lax.psum(y_BxD, mlp_axes))

    transform = parameters.get("embedding_transform")
    if transform is not None:
        transform = jax.tree.map(gather, logical["embedding_transform"], transform, is_leaf=is_axes)
    x_BxD = memory.transform_input(transform, config, inputs_BxD, compute_dtype)
    x_BxD = modules.run(
        call_block,
        functools.partial(Block, config, compute_dtype),
        parameters["h"],
        x_BxD,
        remat=remat,
        prepare=gather_block,
        unroll=max(count for count in range(1, _MOST_UNROLLED + 1) if config.blocks % count == 0),
    )
    return memory.final_norm(parameters["final_norm"], config, x_BxD)
