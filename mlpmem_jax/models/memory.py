"""The MLP memory: residual feed-forward blocks that turn a hidden state into next-token logits.

Section 3 of the paper "MLP Memory" (arXiv 2508.01832). Positions never mix. Family `gpt2` has the feed-forward
layers of GPT-2 (LayerNorm, two projections), family `llama` those of Llama and Mistral (RMSNorm, SwiGLU).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from mlpmem_jax.core import mesh as meshes
from mlpmem_jax.core.errors import ConfigError
from mlpmem_jax.models import layers, modules

_MOST_UNROLLED = 9
"""Most blocks in a turn of the loop on a mesh: compilers gather one's parameters beside another's products in a turn.

All turns have as many: of a last one with fewer, everything kept for the backward pass would be copied once more.
"""


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Dimensions of a memory; `padded_vocab_size` is the vocabulary rounded up to what the mesh divides."""

    family: str
    vocab_size: int
    padded_vocab_size: int
    input_width: int
    width: int
    blocks: int
    feed_forward_width: int
    norm_epsilon: float = 1e-5
    activation: str = "gelu_new"

    def __post_init__(self):
        if self.family not in ("gpt2", "llama"):
            raise ValueError(f"memory family {self.family!r}: expected 'gpt2' or 'llama'")
        if self.activation not in layers.ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r}: expected one of {sorted(layers.ACTIVATIONS)}")
        if self.padded_vocab_size < self.vocab_size:
            raise ValueError(f"padded_vocab_size {self.padded_vocab_size} < vocab_size {self.vocab_size}")


class Block(nnx.Module):
    """x + feed_forward(norm(x)); the residual stream is float32."""

    def __init__(self, config: MemoryConfig, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.norm = _norm(config, rngs)
        feed_forward = layers.FeedForward if config.family == "gpt2" else layers.GatedFeedForward
        self.mlp = feed_forward(config, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.mlp(self.norm(x))


class Memory(nnx.Module):
    """The parameters of the whole network; blocks are stacked on a leading axis."""

    def __init__(self, config: MemoryConfig, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        if config.input_width != config.width:
            self.embedding_transform = _transform(config, dtype, rngs)
        self.h = modules.stack(functools.partial(Block, config, dtype), config.blocks, rngs)
        self.final_norm = _norm(config, rngs)
        self.lm_head = nnx.Linear(
            config.width,
            config.padded_vocab_size,
            use_bias=False,
            dtype=dtype,
            rngs=rngs,
            kernel_init=nnx.initializers.normal(0.02),
            kernel_metadata={"logical_axes": ("embed", "vocab")},
        )


def _transform(config: MemoryConfig, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        config.input_width,
        config.width,
        dtype=dtype,
        rngs=rngs,
        kernel_init=nnx.initializers.normal(0.02),
        kernel_metadata={"logical_axes": ("embed", None)},
        bias_metadata={"logical_axes": (None,)},
    )


def _norm(config: MemoryConfig, rngs: nnx.Rngs) -> nnx.LayerNorm | nnx.RMSNorm:
    norm = layers.rms_norm if config.family == "llama" else layers.layer_norm
    return norm(config.width, config.norm_epsilon, rngs)


def init(config: MemoryConfig, key: jax.Array, output_kernel_DxV: jax.Array | None = None) -> dict:
    """Fresh float32 parameters: normal of deviation 0.02, residual projections divided by sqrt(2 blocks).

    With `output_kernel_DxV` ([width, vocab_size], the base LM's) the output projection starts from it, padded
    with zeros to the padded vocabulary; ValueError when its shape differs.
    """
    parameters = modules.initialize(functools.partial(Memory, config, jnp.float32), key)
    if output_kernel_DxV is not None:
        expected = (config.width, config.vocab_size)
        if output_kernel_DxV.shape != expected:
            raise ValueError(f"the output projection to start from is {output_kernel_DxV.shape}, expected {expected}")
        padding = ((0, 0), (0, config.padded_vocab_size - config.vocab_size))
        parameters["lm_head"]["kernel"] = jnp.pad(output_kernel_DxV.astype(jnp.float32), padding)
    return parameters


def logical_axes(config: MemoryConfig) -> dict:
    """The tree of `init` with the tuple of logical axis names of each array."""
    return modules.logical_axes(functools.partial(Memory, config, jnp.float32))


def hidden(
    parameters: dict,
    config: MemoryConfig,
    inputs_BxD: jax.Array,
    *,
    compute_dtype: jax.typing.DTypeLike = jnp.float32,
    remat: bool = False,
    cut: meshes.Cut | None = None,
) -> jax.Array:
    """Hidden states after the final norm, float32 [..., width], of inputs [..., input_width].

    Matrix products run in `compute_dtype`; norms and the residual stream in float32. Differentiated, matrix
    products are kept for the backward pass; with `remat` the input of each block alone.

    On a mesh inputs are [positions, input_width], and the residual stream is cut by position over all of its axes: each
    block gathers its parameters over the axes of `embed` and its positions over those of `mlp`, both in
    `compute_dtype`, and scatters the sums of its outputs. Gradients go the same ways back: they are scattered, not
    summed on every device.

    Raises:
      ConfigError: the mesh does not divide the positions.
    """
    parameters = {name: tree for name, tree in parameters.items() if name != "lm_head"}
    if cut is None:
        return _hidden(config, compute_dtype, remat, None, {}, (), parameters, inputs_BxD)
    positions = inputs_BxD.shape[0]
    if positions % cut.parts(cut.batch):
        raise ConfigError(
            f"config.mesh: {positions} positions cannot be cut in {cut.parts(cut.batch)} equal parts over {cut.batch}"
        )
    mlp_axes = cut.position_axes(positions, cut.mlp)
    logical = {name: axes for name, axes in logical_axes(config).items() if name != "lm_head"}
    stream = PartitionSpec(cut.batch + mlp_axes)
    return jax.shard_map(
        functools.partial(_hidden, config, compute_dtype, remat, cut, logical, mlp_axes),
        mesh=cut.mesh,
        in_specs=(_map_axes(cut.spec, logical), stream),
        out_specs=stream,
        check_vma=False,  # sums over `mlp` are of outputs, which JAX could not tell from those of whole arrays
    )(parameters, inputs_BxD)


def _hidden(config, compute_dtype, remat, cut: meshes.Cut | None, logical, mlp_axes, parameters, x_BxD):
    """`hidden` of one device; of several, by `cut` and the parameters' `logical` axes.

    Positions are cut over `mlp_axes` beside those of the batch.
    """
    if config.input_width != config.width:
        transform = parameters["embedding_transform"]
        if cut is not None:
            gather = functools.partial(_gathered, cut, compute_dtype)
            transform = _map_axes(gather, logical["embedding_transform"], transform)
        x_BxD = modules.bind(functools.partial(_transform, config, compute_dtype), transform)(x_BxD)

    def whole(block: dict) -> dict:
        """A block's parameters with those that `embed` cuts gathered; one of the parts that are summed has the bias."""
        axes = _map_axes(lambda axes: axes[1:], logical["h"])  # of one block, without "layers"
        block = _map_axes(functools.partial(_gathered, cut, compute_dtype), axes, block)
        if config.family == "llama":
            return block
        first = jax.lax.axis_index(cut.mlp) == 0
        output = block["mlp"]["c_proj"]
        output = {**output, "bias": jnp.where(first, output["bias"], 0)}
        return {**block, "mlp": {**block["mlp"], "c_proj": output}}

    def call_part(block: Block, x_BxD: jax.Array) -> jax.Array:
        y_BxD = jax.lax.all_gather(block.norm(x_BxD).astype(compute_dtype), mlp_axes, axis=0, tiled=True)
        y_BxD = jax.lax.psum_scatter(block.mlp(y_BxD), mlp_axes, scatter_dimension=0, tiled=True)
        return x_BxD + jax.lax.psum(y_BxD, cut.mlp if not mlp_axes else ())

    build = functools.partial(Block, config, compute_dtype)
    call, prepare, unroll = Block.__call__, None, 1
    if cut is not None:
        call, prepare = call_part, whole
        unroll = max(count for count in range(1, _MOST_UNROLLED + 1) if config.blocks % count == 0)
    x_BxD = modules.run(
        call, build, parameters["h"], x_BxD.astype(jnp.float32), remat=remat, prepare=prepare, unroll=unroll
    )
    return modules.bind(functools.partial(_norm, config), parameters["final_norm"])(x_BxD)


def _gathered(cut: meshes.Cut, dtype: jax.typing.DTypeLike, axes: tuple[str | None, ...], array: jax.Array):
    if "embed" not in axes:
        return array
    return jax.lax.all_gather(array.astype(dtype), cut.embed, axis=axes.index("embed"), tiled=True)


def _map_axes(function, logical, *trees):
    return jax.tree.map(function, logical, *trees, is_leaf=lambda leaf: isinstance(leaf, tuple))


def output_kernel(parameters: dict) -> jax.Array:
    """The output projection [width, padded vocabulary]."""
    return parameters["lm_head"]["kernel"]


def logits(
    parameters: dict,
    config: MemoryConfig,
    inputs_BxD: jax.Array,
    *,
    compute_dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Next-token logits, float32 [..., padded vocabulary], minus infinity at the padding."""
    hidden_BxD = hidden(parameters, config, inputs_BxD, compute_dtype=compute_dtype).astype(compute_dtype)
    kernel_DxV = output_kernel(parameters).astype(compute_dtype)
    logits_BxV = jnp.dot(hidden_BxD, kernel_DxV, preferred_element_type=jnp.float32)
    return jnp.where(jnp.arange(config.padded_vocab_size) < config.vocab_size, logits_BxV, -jnp.inf)
