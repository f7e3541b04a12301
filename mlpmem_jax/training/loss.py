"""The training loss on sparse targets, without the logits of the whole batch.

Positions are processed in chunks. When gradients are needed, the forward pass computes a chunk's logits, loss and
gradients together and keeps only the gradients, so that each chunk costs three matrix products rather than the four
of rematerialization, and memory grows with the chunk size, not with positions x vocabulary.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mlpmem_jax.core.errors import ConfigError
from mlpmem_jax.core.sharding import LOCAL, Sharding
from mlpmem_jax.models.layers import transposed_product


class _Targets(NamedTuple):
    """The targets of each position, and its weight in the mean: 0 where a chunk is padded."""

    token_ids_NxE: jax.Array
    probabilities_NxE: jax.Array
    next_tokens_N: jax.Array
    weights_N: jax.Array


class _Settings(NamedTuple):
    """The static settings of the program.

    Attributes:
      batch_axes, embed_axes, vocab_axes: mesh axes that shard the logical axes of these names; empty on one device.
      hidden_axes: the vocabulary's mesh axes, if they also shard the hidden states after the batch axes; else empty.
    """

    alpha: float
    vocab_size: int
    chunk: int
    sharding: Sharding
    batch_axes: tuple[str, ...]
    embed_axes: tuple[str, ...]
    vocab_axes: tuple[str, ...]
    hidden_axes: tuple[str, ...]


@jax.named_scope("loss")
def sparse_cross_entropy(
    hidden_NxD: jax.Array,
    kernel_DxV: jax.Array,
    token_ids_NxE: jax.Array,
    probabilities_NxE: jax.Array,
    next_tokens_N: jax.Array,
    *,
    alpha: float,
    vocab_size: int,
    chunk: int,
    sharding: Sharding = LOCAL,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """alpha * KL(p_kNN || p_MLP) + (1 - alpha) * CE(next token), averaged over positions: the paper's training loss.

    With z the logits, KL(p || q) = sum_j p_j (log p_j - z_j) + logsumexp(z) over the stored j only. The stored
    (float16) probabilities of a position are renormalized to sum to 1; a position without any has a divergence of 0.

    Matrix products run in the dtype of `hidden_NxD`; losses and the kernel's gradient accumulate in float32.
    Differentiable once, in reverse mode, in `hidden_NxD` and `kernel_DxV`; the statistics carry no gradient.

    Args:
      hidden_NxD: float32 or bfloat16, sharded over the "batch" mesh axes.
      kernel_DxV: output projection, sharded ("embed", "vocab"). V >= vocab_size; further columns are padding, never
        predicted and without gradient. If the mesh does not divide V, it is padded here.
      token_ids_NxE: int32, ids below vocab_size. E may be 0. Entries of probability 0 are padding.
      probabilities_NxE: float, not negative.
      next_tokens_N: int32.
      alpha: weight of the divergence, 0 to 1.
      vocab_size: number of real tokens.
      chunk: maximum positions per device whose logits are in memory together.
      sharding: sharding of the arrays; by default they are on one device.

    Returns:
      The loss (float32 scalar), and {"kl", "cross_entropy"}: means over positions, in nats.

    Raises:
      ConfigError: alpha or chunk is out of range, the mesh does not divide the positions or a width, or the kernel
        cannot be gathered under the sharding rules.
    """
    if padding := -kernel_DxV.shape[1] % sharding.shards("vocab"):
        kernel_DxV = jnp.pad(kernel_DxV, ((0, 0), (0, padding)))
    settings = _checked(alpha, vocab_size, chunk, sharding, hidden_NxD.shape[0], kernel_DxV.shape)
    weights_N = jnp.full(hidden_NxD.shape[0], 1 / hidden_NxD.shape[0], jnp.float32)
    targets = _Targets(token_ids_NxE, probabilities_NxE, next_tokens_N, weights_N)
    return _loss(settings, hidden_NxD, kernel_DxV, targets)


def _checked(alpha, vocab_size, chunk, sharding: Sharding, positions, kernel_shape) -> _Settings:
    if not 0 <= alpha <= 1:
        raise ConfigError(f"training.alpha: expected a number from 0 to 1, found {alpha}")
    if chunk < 1:
        raise ConfigError(f"training.loss_chunk: expected at least 1 position, found {chunk}")
    if vocab_size > kernel_shape[1]:
        raise ConfigError(f"the output projection has {kernel_shape[1]} columns for {vocab_size} tokens")
    sharding.check_collectives()
    for name, axis, size in (("positions", "batch", positions), ("width", "embed", kernel_shape[0])):
        if size % (shards := sharding.shards(axis)):
            raise ConfigError(
                f"config.mesh: {name} of {size} cannot be divided into {shards} equal shards over "
                f"{'+'.join(sharding.axes(axis))}"
            )
    batch, embed, vocab = (sharding.axes(axis) for axis in ("batch", "embed", "vocab"))
    hidden_axes = sharding.sequence_axes(positions, "vocab")
    return _Settings(alpha, vocab_size, chunk, sharding, batch, embed, vocab, hidden_axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(settings: _Settings, hidden_NxD, kernel_DxV, targets):
    scalars = PartitionSpec(), PartitionSpec()
    return _on_mesh(settings, _local_loss, scalars)(hidden_NxD, kernel_DxV, targets)


def _loss_forward(settings: _Settings, hidden_NxD, kernel_DxV, targets):
    scalars = PartitionSpec(), PartitionSpec()
    outputs = scalars, _gradient_specs(settings)
    return _on_mesh(settings, _local_loss_and_gradients, outputs)(hidden_NxD, kernel_DxV, targets)


def _loss_backward(settings: _Settings, gradients, cotangents):
    scaled = jax.tree.map(lambda gradient: gradient * cotangents[0].astype(gradient.dtype), gradients)
    return *scaled, None


_loss.defvjp(_loss_forward, _loss_backward)


def _gradient_specs(settings: _Settings) -> tuple[PartitionSpec, PartitionSpec]:
    """Partition specs of the hidden states and of the kernel, and of their gradients."""
    hidden = PartitionSpec(settings.batch_axes + settings.hidden_axes)
    return hidden, PartitionSpec(settings.embed_axes, settings.vocab_axes)


def _on_mesh(settings: _Settings, local, out_specs):
    """`local`, a function of one device's arrays, as a function of arrays on the mesh."""
    local = functools.partial(local, settings)
    if settings.sharding.is_local:
        return local
    return jax.shard_map(
        local,
        mesh=settings.sharding.mesh,
        in_specs=(*_gradient_specs(settings), PartitionSpec(settings.batch_axes)),
        out_specs=out_specs,
        # Never differentiated through, so JAX need not track which values are replicated.
        check_vma=False,
    )


def _gathered(settings: _Settings, hidden_NxD, kernel_DxV):
    """All positions of this device's batch shard, and all rows of its vocabulary shard."""
    kernel_DxV = jax.lax.all_gather(kernel_DxV.astype(hidden_NxD.dtype), settings.embed_axes, axis=0, tiled=True)
    return jax.lax.all_gather(hidden_NxD, settings.hidden_axes, axis=0, tiled=True), kernel_DxV


def _total(settings: _Settings, sums):
    """The loss and its statistics from every device's (sum of KL, sum of cross entropy)."""
    kl, cross_entropy = jax.lax.psum(sums, settings.batch_axes + settings.vocab_axes)
    loss = settings.alpha * kl + (1 - settings.alpha) * cross_entropy
    return loss, {"kl": kl, "cross_entropy": cross_entropy}


def _local_loss(settings: _Settings, hidden_NxD, kernel_DxV, targets: _Targets):
    """(loss, statistics) of one device's positions and vocabulary shard."""
    hidden_NxD, kernel_DxV = _gathered(settings, hidden_NxD, kernel_DxV)

    def step(sums, chunk):
        return jax.tree.map(jnp.add, sums, _chunk_loss(settings, kernel_DxV, *chunk).sums), None

    chunks = _chunks(settings.chunk, (hidden_NxD, targets))
    sums, _ = jax.lax.scan(step, (jnp.zeros(()), jnp.zeros(())), chunks)
    return _total(settings, sums)


def _local_loss_and_gradients(settings: _Settings, hidden_NxD, kernel_DxV, targets: _Targets):
    """((loss, statistics), (d_hidden, d_kernel)) of one device, like `_local_loss`."""
    hidden_NxD, kernel_DxV = _gathered(settings, hidden_NxD, kernel_DxV)

    def step(carry, chunk):
        sums, d_kernel_DxV = carry
        computed = _chunk_loss(settings, kernel_DxV, *chunk)
        d_hidden_CxD, d_chunk_kernel_DxV = _chunk_gradients(settings, kernel_DxV, *chunk, computed)
        return (jax.tree.map(jnp.add, sums, computed.sums), d_kernel_DxV + d_chunk_kernel_DxV), d_hidden_CxD

    chunks = _chunks(settings.chunk, (hidden_NxD, targets))
    zeros = (jnp.zeros(()), jnp.zeros(())), jnp.zeros(kernel_DxV.shape, jnp.float32)
    (sums, d_kernel_DxV), d_hidden = jax.lax.scan(step, zeros, chunks)

    d_kernel_DxV = jax.lax.psum_scatter(d_kernel_DxV, settings.embed_axes, scatter_dimension=0, tiled=True)
    d_kernel_DxV = jax.lax.psum(d_kernel_DxV, tuple(a for a in settings.batch_axes if a not in settings.embed_axes))
    d_hidden_NxD = d_hidden.reshape(-1, hidden_NxD.shape[1])[: hidden_NxD.shape[0]]
    if settings.hidden_axes:
        d_hidden_NxD = jax.lax.psum_scatter(d_hidden_NxD, settings.hidden_axes, scatter_dimension=0, tiled=True)
    else:
        d_hidden_NxD = jax.lax.psum(d_hidden_NxD, settings.vocab_axes)
    return _total(settings, sums), (d_hidden_NxD, d_kernel_DxV)


def _chunks(chunk: int, tree):
    """Splits axis 0 into the fewest chunks of equal size, padded with zeros (positions of weight 0)."""
    positions = jax.tree.leaves(tree)[0].shape[0]
    count = max(1, -(-positions // chunk))
    padding = -positions % count

    def split(array):
        array = jnp.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1)) if padding else array
        return array.reshape(count, (positions + padding) // count, *array.shape[1:])

    return jax.tree.map(split, tree)


class _ChunkLoss(NamedTuple):
    """The loss of a chunk over this device's vocabulary shard, and intermediates for its gradients.

    Attributes:
      sums: weighted sums over the chunk's positions of KL and of cross entropy.
      exponentials_CxV, normalizer_Cx1: their quotient is the softmax.
      ids_CxE1, is_here_CxE1: columns of the stored entries and, last, of the next token; and whether they are on this
        device (if not, the column is 0).
      p_CxE: the stored probabilities, renormalized to sum to 1.
    """

    sums: tuple[jax.Array, jax.Array]
    exponentials_CxV: jax.Array
    normalizer_Cx1: jax.Array
    ids_CxE1: jax.Array
    is_here_CxE1: jax.Array
    p_CxE: jax.Array


def _chunk_loss(settings: _Settings, kernel_DxV, hidden_CxD, targets: _Targets) -> _ChunkLoss:
    columns = kernel_DxV.shape[1]
    first = jax.lax.axis_index(settings.vocab_axes) * columns
    logits_CxV = jnp.dot(hidden_CxD, kernel_DxV, preferred_element_type=jnp.float32)
    if settings.vocab_size < columns * settings.sharding.size(settings.vocab_axes):
        real_V = first + jnp.arange(columns) < settings.vocab_size
        logits_CxV = jnp.where(real_V, logits_CxV, -jnp.inf)
    maximum_Cx1 = jax.lax.pmax(logits_CxV.max(-1, keepdims=True), settings.vocab_axes)
    exponentials_CxV = jnp.exp(logits_CxV - maximum_Cx1)
    normalizer_Cx1 = jax.lax.psum(exponentials_CxV.sum(-1, keepdims=True), settings.vocab_axes)

    # The stored entries and, last, the next token. Each device looks up those in its vocabulary shard.
    ids_CxE1 = jnp.concatenate([targets.token_ids_NxE, targets.next_tokens_N[:, None]], axis=1) - first
    is_here_CxE1 = (ids_CxE1 >= 0) & (ids_CxE1 < columns)
    ids_CxE1 = jnp.where(is_here_CxE1, ids_CxE1, 0)
    entry_logits_CxE1 = jnp.take_along_axis(logits_CxV, ids_CxE1, axis=1, mode="promise_in_bounds")
    log_q_CxE1 = entry_logits_CxE1 - maximum_Cx1 - jnp.log(normalizer_Cx1)

    p_CxE = targets.probabilities_NxE.astype(jnp.float32)
    mass_Cx1 = p_CxE.sum(-1, keepdims=True)
    p_CxE = p_CxE / jnp.where(mass_Cx1 > 0, mass_Cx1, 1)
    log_ratio_CxE = jnp.log(jnp.where(p_CxE > 0, p_CxE, 1)) - log_q_CxE1[:, :-1]
    is_counted_CxE = (p_CxE > 0) & is_here_CxE1[:, :-1]
    kl = jnp.sum(targets.weights_N[:, None] * jnp.where(is_counted_CxE, p_CxE * log_ratio_CxE, 0))
    cross_entropy = -jnp.sum(targets.weights_N * jnp.where(is_here_CxE1[:, -1], log_q_CxE1[:, -1], 0))
    return _ChunkLoss((kl, cross_entropy), exponentials_CxV, normalizer_Cx1, ids_CxE1, is_here_CxE1, p_CxE)


def _chunk_gradients(settings: _Settings, kernel_DxV, hidden_CxD, targets: _Targets, computed: _ChunkLoss):
    """(d_hidden_CxD, d_kernel_DxV) from this device's vocabulary shard.

    The gradient of the logits is weight * (mass * exponentials / normalizer - target). The factor of the exponentials
    is one number per row: moving it out of the matrix products saves a pass over [C, V].
    """
    alpha, ids_CxE1 = settings.alpha, computed.ids_CxE1
    target_CxE1 = jnp.pad(alpha * computed.p_CxE, ((0, 0), (0, 1)), constant_values=1 - alpha)
    mass_Cx1 = target_CxE1.sum(-1, keepdims=True)
    factor_Cx1 = targets.weights_N[:, None] * mass_Cx1 / computed.normalizer_Cx1
    scaled_target_CxE1 = target_CxE1 * computed.normalizer_Cx1 / jnp.where(mass_Cx1 > 0, mass_Cx1, 1)
    entries_CxE1 = jnp.where(computed.is_here_CxE1, scaled_target_CxE1, 0)
    rows_Cx1 = jnp.arange(ids_CxE1.shape[0])[:, None]
    gradient_CxV = computed.exponentials_CxV.at[rows_Cx1, ids_CxE1].add(-entries_CxE1, mode="promise_in_bounds")
    gradient_CxV = gradient_CxV.astype(kernel_DxV.dtype)
    d_hidden_CxD = factor_Cx1 * jnp.dot(gradient_CxV, kernel_DxV.T, preferred_element_type=jnp.float32)
    d_hidden_CxD = d_hidden_CxD.astype(hidden_CxD.dtype)
    scaled_CxD = (hidden_CxD * factor_Cx1).astype(hidden_CxD.dtype)
    return d_hidden_CxD, transposed_product(scaled_CxD, gradient_CxV, preferred_element_type=jnp.float32)
