"""The training loss on sparse targets, without the logits of the whole batch.

Positions are taken in chunks. Where gradients are asked for, the forward pass computes a chunk's logits, loss and
gradients together and keeps the gradients alone, so that each chunk costs three matrix products rather than the four
of rematerialisation, and memory grows with the chunk, not with positions x vocabulary.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from mlpmem_jax.core import mesh as meshes
from mlpmem_jax.core.errors import ConfigError
from mlpmem_jax.core.mesh import RULES, Rules
from mlpmem_jax.models.layers import transposed_product


class _Targets(NamedTuple):
    """What each position should predict, and its share of the mean."""

    token_ids_NxS: jax.Array
    probabilities_NxS: jax.Array
    next_tokens_N: jax.Array
    weights_N: jax.Array


class _Plan(NamedTuple):
    """All that is known when the program is traced. On a single device the cut names no mesh axes."""

    alpha: float
    vocab_size: int
    chunk: int
    cut: meshes.Cut
    hidden_axes: tuple[str, ...]  # those of the vocabulary where they cut the hidden states as well, beside the batch


_ONE_DEVICE = meshes.Cut(mesh=None, batch=(), embed=(), mlp=(), vocab=())


def sparse_cross_entropy(
    hidden_NxD: jax.Array,
    kernel_DxV: jax.Array,
    token_ids_NxS: jax.Array,
    probabilities_NxS: jax.Array,
    next_tokens_N: jax.Array,
    *,
    alpha: float,
    vocab_size: int,
    chunk: int,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
    weights_N: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """alpha * KL(p_kNN || p_MLP) + (1 - alpha) * CE(next token), meaned over positions; the paper's training loss.

    With z the logits, KL(p || q) = sum_j p_j (log p_j - z_j) + logsumexp(z) over the stored j only. The stored
    (float16) probabilities of a position are made to sum to 1; a position with none has a divergence of 0.

    Matrix products run in the dtype of `hidden_NxD`; losses and the kernel's gradient accumulate in float32.
    Differentiable once, in reverse mode, in `hidden_NxD` and `kernel_DxV`; the statistics carry no gradient.

    Args:
      hidden_NxD: float32 or bfloat16, sharded over the "batch" mesh axes.
      kernel_DxV: output projection, sharded ("embed", "vocab"). V >= vocab_size; what is beyond is padding, never
        predicted and without gradient. A V that the mesh does not divide is padded here.
      token_ids_NxS: int32, ids below vocab_size. S may be 0. Entries of probability 0 are padding.
      probabilities_NxS: float, not negative.
      next_tokens_N: int32.
      alpha: weight of the divergence, 0 to 1.
      vocab_size: number of real tokens.
      chunk: most positions per device whose logits exist at once.
      mesh: the device mesh; None means one device.
      rules: mesh axes of the logical axes "batch", "embed" and "vocab".
      weights_N: float, not negative; the mean is over their sum. None weighs all positions alike.

    Returns:
      The loss (float32 scalar), and {"kl", "cross_entropy"}: means over positions, in nats.

    Raises:
      ConfigError: alpha or chunk out of range, positions or a width that the mesh does not divide, or rules under
        which the kernel cannot be gathered.
    """
    cut = _ONE_DEVICE if mesh is None else meshes.cut(mesh, rules) or _ONE_DEVICE
    if padding := -kernel_DxV.shape[1] % cut.parts(cut.vocab):
        kernel_DxV = jnp.pad(kernel_DxV, ((0, 0), (0, padding)))
    plan = _plan(alpha, vocab_size, chunk, cut, hidden_NxD.shape[0], kernel_DxV.shape)
    if weights_N is None:
        weights_N = jnp.full(hidden_NxD.shape[0], 1 / hidden_NxD.shape[0], jnp.float32)
    else:
        total = weights_N.sum(dtype=jnp.float32)
        weights_N = weights_N.astype(jnp.float32) / jnp.where(total > 0, total, 1)
    return _loss(plan, hidden_NxD, kernel_DxV, _Targets(token_ids_NxS, probabilities_NxS, next_tokens_N, weights_N))


def _plan(alpha, vocab_size, chunk, cut: meshes.Cut, positions, kernel_shape) -> _Plan:
    if not 0 <= alpha <= 1:
        raise ConfigError(f"training.alpha: expected a number from 0 to 1, found {alpha}")
    if chunk < 1:
        raise ConfigError(f"training.loss_chunk: expected at least 1 position, found {chunk}")
    if vocab_size > kernel_shape[1]:
        raise ConfigError(f"the output projection has {kernel_shape[1]} columns for {vocab_size} tokens")
    for name, axes, size in (("positions", cut.batch, positions), ("width", cut.embed, kernel_shape[0])):
        if size % (parts := cut.parts(axes)):
            raise ConfigError(f"config.mesh: {name} of {size} cannot be cut in {parts} equal parts over axes {axes}")
    hidden_axes = cut.position_axes(positions, cut.vocab)
    return _Plan(alpha, vocab_size, chunk, cut, hidden_axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(plan, hidden_NxD, kernel_DxV, targets):
    return _on_mesh(plan, False, hidden_NxD, kernel_DxV, targets)[0]


def _loss_forward(plan, hidden_NxD, kernel_DxV, targets):
    return _on_mesh(plan, True, hidden_NxD, kernel_DxV, targets)


def _loss_backward(plan, gradients, cotangents):
    scaled = jax.tree.map(lambda gradient: gradient * cotangents[0].astype(gradient.dtype), gradients)
    return *scaled, None


_loss.defvjp(_loss_forward, _loss_backward)


def _on_mesh(plan: _Plan, differentiate: bool, hidden_NxD, kernel_DxV, targets):
    """((loss, statistics), (d_hidden, d_kernel) or None)."""
    local = functools.partial(_local_loss, plan, differentiate)
    if plan.cut.mesh is not None:
        batch = PartitionSpec(plan.cut.batch)
        hidden = PartitionSpec(plan.cut.batch + plan.hidden_axes)
        kernel = PartitionSpec(plan.cut.embed, plan.cut.vocab)
        gradients = (hidden, kernel) if differentiate else None
        local = jax.shard_map(
            local,
            mesh=plan.cut.mesh,
            in_specs=(hidden, kernel, batch),
            out_specs=((PartitionSpec(), PartitionSpec()), gradients),
            # Never differentiated through, so nothing depends on JAX tracking which values are replicated.
            check_vma=False,
        )
    return local(hidden_NxD, kernel_DxV, targets)


def _local_loss(plan: _Plan, differentiate: bool, hidden_NxD, kernel_DxV, targets):
    """What one device does for its positions and its part of the vocabulary. Collectives over () do nothing."""
    kernel_DxV = jax.lax.all_gather(kernel_DxV.astype(hidden_NxD.dtype), plan.cut.embed, axis=0, tiled=True)
    hidden_NxD = jax.lax.all_gather(hidden_NxD, plan.hidden_axes, axis=0, tiled=True)

    def step(carry, chunk):
        sums, d_kernel_DxV = carry
        chunk_sums, chunk_gradients = _chunk_loss(plan, differentiate, kernel_DxV, *chunk)
        sums = jax.tree.map(jnp.add, sums, chunk_sums)
        if not differentiate:
            return (sums, None), None
        d_hidden_CxD, d_chunk_kernel_DxV = chunk_gradients
        return (sums, d_kernel_DxV + d_chunk_kernel_DxV), d_hidden_CxD

    zeros = (jnp.zeros(()), jnp.zeros(()))
    d_kernel_DxV = jnp.zeros(kernel_DxV.shape, jnp.float32) if differentiate else None
    chunks, positions = _cut(plan.chunk, (hidden_NxD, targets))
    (sums, d_kernel_DxV), d_hidden = jax.lax.scan(step, (zeros, d_kernel_DxV), chunks)

    kl, cross_entropy = jax.lax.psum(sums, plan.cut.batch + plan.cut.vocab)
    loss = plan.alpha * kl + (1 - plan.alpha) * cross_entropy
    primal = loss, {"kl": kl, "cross_entropy": cross_entropy}
    if not differentiate:
        return primal, None
    d_kernel_DxV = jax.lax.psum_scatter(d_kernel_DxV, plan.cut.embed, scatter_dimension=0, tiled=True)
    d_kernel_DxV = jax.lax.psum(d_kernel_DxV, tuple(a for a in plan.cut.batch if a not in plan.cut.embed))
    d_hidden_NxD = d_hidden.reshape(-1, hidden_NxD.shape[1])[:positions]
    if plan.hidden_axes:
        d_hidden_NxD = jax.lax.psum_scatter(d_hidden_NxD, plan.hidden_axes, scatter_dimension=0, tiled=True)
    else:
        d_hidden_NxD = jax.lax.psum(d_hidden_NxD, plan.cut.vocab)
    return primal, (d_hidden_NxD, d_kernel_DxV)


def _cut(chunk: int, tree):
    """Cuts axis 0 in the fewest equal chunks, padded with zeros (positions of weight 0)."""
    positions = jax.tree.leaves(tree)[0].shape[0]
    count = max(1, -(-positions // chunk))
    padding = -positions % count

    def cut(array):
        array = jnp.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1)) if padding else array
        return array.reshape(count, (positions + padding) // count, *array.shape[1:])

    return jax.tree.map(cut, tree), positions


def _chunk_loss(plan: _Plan, differentiate: bool, kernel_DxV, hidden_CxD, targets: _Targets):
    """((weighted sum of KL, of cross entropy), (d_hidden_CxD, d_kernel_DxV) or None).

    Sums and d_hidden_CxD are of this device's part of the vocabulary.
    """
    first = jax.lax.axis_index(plan.cut.vocab) * kernel_DxV.shape[1]
    logits_CxV = jnp.dot(hidden_CxD, kernel_DxV, preferred_element_type=jnp.float32)
    if plan.vocab_size < kernel_DxV.shape[1] * plan.cut.parts(plan.cut.vocab):
        real_V = first + jnp.arange(kernel_DxV.shape[1]) < plan.vocab_size
        logits_CxV = jnp.where(real_V, logits_CxV, -jnp.inf)
    maximum_Cx1 = jax.lax.pmax(logits_CxV.max(-1, keepdims=True), plan.cut.vocab)
    exponentials_CxV = jnp.exp(logits_CxV - maximum_Cx1)
    normalizer_Cx1 = jax.lax.psum(exponentials_CxV.sum(-1, keepdims=True), plan.cut.vocab)

    # The stored entries and, last, the next token. Each device looks up those of its own part of the vocabulary.
    ids_CxE = jnp.concatenate([targets.token_ids_NxS, targets.next_tokens_N[:, None]], axis=1) - first
    here_CxE = (ids_CxE >= 0) & (ids_CxE < kernel_DxV.shape[1])
    ids_CxE = jnp.where(here_CxE, ids_CxE, 0)
    entry_logits_CxE = jnp.take_along_axis(logits_CxV, ids_CxE, axis=1, mode="promise_in_bounds")
    log_q_CxE = entry_logits_CxE - maximum_Cx1 - jnp.log(normalizer_Cx1)

    p_CxS = targets.probabilities_NxS.astype(jnp.float32)
    mass_Cx1 = p_CxS.sum(-1, keepdims=True)
    p_CxS = p_CxS / jnp.where(mass_Cx1 > 0, mass_Cx1, 1)
    log_ratio_CxS = jnp.log(jnp.where(p_CxS > 0, p_CxS, 1)) - log_q_CxE[:, :-1]
    counted_CxS = (p_CxS > 0) & here_CxE[:, :-1]
    kl = jnp.sum(targets.weights_N[:, None] * jnp.where(counted_CxS, p_CxS * log_ratio_CxS, 0))
    sums = kl, -jnp.sum(targets.weights_N * jnp.where(here_CxE[:, -1], log_q_CxE[:, -1], 0))
    if not differentiate:
        return sums, None

    # The gradient of the logits is weight * (mass * exponentials / normalizer - target). The factor before the
    # exponentials is one number a row: taken out of the matrix products, it saves a pass over [C, V].
    target_CxE = jnp.pad(plan.alpha * p_CxS, ((0, 0), (0, 1)), constant_values=1 - plan.alpha)
    mass_Cx1 = target_CxE.sum(-1, keepdims=True)
    factor_Cx1 = targets.weights_N[:, None] * mass_Cx1 / normalizer_Cx1
    entries_CxE = jnp.where(here_CxE, target_CxE * normalizer_Cx1 / jnp.where(mass_Cx1 > 0, mass_Cx1, 1), 0)
    rows_Cx1 = jnp.arange(ids_CxE.shape[0])[:, None]
    gradient_CxV = exponentials_CxV.at[rows_Cx1, ids_CxE].add(-entries_CxE, mode="promise_in_bounds")
    gradient_CxV = gradient_CxV.astype(kernel_DxV.dtype)
    d_hidden_CxD = factor_Cx1 * jnp.dot(gradient_CxV, kernel_DxV.T, preferred_element_type=jnp.float32)
    d_hidden_CxD = d_hidden_CxD.astype(hidden_CxD.dtype)
    scaled_CxD = (hidden_CxD * factor_Cx1).astype(hidden_CxD.dtype)
    d_kernel_DxV = transposed_product(scaled_CxD, gradient_CxV, preferred_element_type=jnp.float32)
    return sums, (d_hidden_CxD, d_kernel_DxV)
