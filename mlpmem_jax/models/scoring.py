"""Forward passes over held-out positions: log-probabilities of the next tokens, and whole distributions.

Inputs and outputs are host arrays; the mesh processes positions in chunks of one fixed shape, so that only one chunk's
logits are in memory and each function compiles once.

Dimensions: N positions, D input width, V vocabulary, S sequences of T positions, B rows of a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.models import language_model, memory, parallel_memory, transformer
from mlpmem_jax.models.memory import MemoryConfig

LOGITS_AT_ONCE = 2**25
"""Default number of logits per chunk and batch shard: 128 MiB of float32."""

POSITIONS_AT_ONCE = 2**13
"""Maximum positions per chunk and batch shard, which limits hidden states if the vocabulary is small."""


def chunk_positions(vocab_size: int, sharding: Sharding) -> int:
    """Positions per chunk: as many as both limits allow, a multiple of the shards of the batch axis."""
    parts = sharding.shards("batch")
    return max(1, min(LOGITS_AT_ONCE // vocab_size, POSITIONS_AT_ONCE)) * parts


def memory_log_probabilities(
    parameters: dict,
    config: MemoryConfig,
    inputs_NxD: np.ndarray,
    next_tokens_N: np.ndarray,
    *,
    sharding: Sharding,
    compute_dtype: jax.typing.DTypeLike = jnp.float32,
    chunk: int | None = None,
) -> np.ndarray:
    """log p_MLP(next token), float32 [N].

    Args:
      parameters: the memory's parameters, on the mesh.
      inputs_NxD: memory inputs, any floating-point type.
      next_tokens_N: int32.
      chunk: positions per chunk on the mesh; by default `chunk_positions`.
    """
    score = functools.partial(
        memory_chunk, parameters, config=config, compute_dtype=jnp.dtype(compute_dtype), sharding=sharding
    )
    chunk = chunk or chunk_positions(config.padded_vocab_size, sharding)
    return _in_chunks(score, (inputs_NxD, next_tokens_N), chunk, sharding)


def memory_distributions(
    parameters: dict,
    config: MemoryConfig,
    inputs_NxD: np.ndarray,
    *,
    sharding: Sharding,
    compute_dtype: jax.typing.DTypeLike = jnp.float32,
) -> np.ndarray:
    """p_MLP over the vocabulary, float32 [N, V]; N is one chunk, whose logits are all in memory."""
    distributions = functools.partial(
        _memory_rows, parameters, config=config, compute_dtype=jnp.dtype(compute_dtype), sharding=sharding
    )
    return _in_chunks(distributions, (inputs_NxD,), len(inputs_NxD), sharding)


def language_model_log_probabilities(
    parameters: dict,
    config: language_model.Config,
    tokens_SxT: np.ndarray,
    next_tokens_SxT: np.ndarray,
    *,
    sharding: Sharding,
    compute_dtype: jax.typing.DTypeLike = jnp.float32,
    chunk: int | None = None,
) -> np.ndarray:
    """log p_LM(next token), float32 [S, T], for separate sequences; `chunk` counts sequences."""
    score = functools.partial(
        _language_model_chunk,
        parameters,
        config=config,
        compute_dtype=jnp.dtype(compute_dtype),
        sharding=sharding,
    )
    chunk = chunk or chunk_positions(config.vocab_size, sharding) // tokens_SxT.shape[1]
    return _in_chunks(score, (tokens_SxT, next_tokens_SxT), chunk, sharding)


def language_model_hidden(
    parameters: dict,
    config: language_model.Config,
    tokens_SxT: np.ndarray,
    *,
    sharding: Sharding,
    compute_dtype: jax.typing.DTypeLike = jnp.float32,
) -> np.ndarray:
    """Hidden states after the LM's final norm, float32 [S, T, D]."""
    hidden = functools.partial(
        _language_model_hidden, parameters, config=config, compute_dtype=jnp.dtype(compute_dtype), sharding=sharding
    )
    return _in_chunks(hidden, (tokens_SxT,), len(tokens_SxT), sharding)


def language_model_distributions(
    parameters: dict,
    hidden_NxD: np.ndarray,
    *,
    sharding: Sharding,
    compute_dtype: jax.typing.DTypeLike = jnp.float32,
) -> np.ndarray:
    """p_LM over the vocabulary, float32 [N, V], from rows of `language_model_hidden`; N is one chunk."""
    distributions = functools.partial(
        _language_model_rows, parameters, compute_dtype=jnp.dtype(compute_dtype), sharding=sharding
    )
    return _in_chunks(distributions, (hidden_NxD,), len(hidden_NxD), sharding)


def next_token_log_probabilities(
    hidden: jax.Array,
    kernel_DxV: jax.Array,
    next_tokens: jax.Array,
    *,
    vocab_size: int,
    compute_dtype: jax.typing.DTypeLike,
    logits_sharding: NamedSharding,
) -> jax.Array:
    """log softmax(hidden @ kernel)[next token], float32 [...], for hidden [..., D] and next tokens [...].

    The next token's logit is selected by comparison and summed, which does not move a sharded vocabulary.
    """
    logits = transformer.project(hidden, kernel_DxV, compute_dtype)
    logits = jax.lax.with_sharding_constraint(logits, logits_sharding)
    columns_V = jnp.arange(kernel_DxV.shape[1])
    logits = jnp.where(columns_V < vocab_size, logits, -jnp.inf)
    chosen = jnp.sum(jnp.where(columns_V == next_tokens[..., None], logits, 0.0), axis=-1)
    log_probabilities = chosen - jax.nn.logsumexp(logits, axis=-1)
    return jax.lax.with_sharding_constraint(log_probabilities, NamedSharding(logits_sharding.mesh, PartitionSpec()))


@functools.partial(jax.jit, static_argnames=("config", "compute_dtype", "sharding"))
def memory_chunk(parameters, inputs_BxD, next_B, *, config, compute_dtype, sharding):
    hidden_BxD = parallel_memory.hidden(
        parameters, config, inputs_BxD.astype(compute_dtype), sharding=sharding, compute_dtype=compute_dtype
    )
    return next_token_log_probabilities(
        jax.lax.with_sharding_constraint(hidden_BxD, sharding.named("batch")),
        memory.output_kernel(parameters),
        next_B,
        vocab_size=config.vocab_size,
        compute_dtype=compute_dtype,
        logits_sharding=sharding.named("batch", "vocab"),
    )


@functools.partial(jax.jit, static_argnames=("config", "compute_dtype", "sharding"))
def _memory_rows(parameters, inputs_BxD, *, config, compute_dtype, sharding):
    logits_BxV = memory.logits(parameters, config, inputs_BxD.astype(compute_dtype), compute_dtype=compute_dtype)
    return _replicated(jax.nn.softmax(logits_BxV[:, : config.vocab_size]), sharding)


@functools.partial(jax.jit, static_argnames=("config", "compute_dtype", "sharding"))
def _language_model_chunk(parameters, tokens_BxT, next_BxT, *, config, compute_dtype, sharding):
    hidden_BxTxD, _ = language_model.features(
        parameters, config, tokens_BxT, compute_dtype=compute_dtype, activations=sharding.activations
    )
    return next_token_log_probabilities(
        hidden_BxTxD,
        language_model.output_kernel(parameters),
        next_BxT,
        vocab_size=config.vocab_size,
        compute_dtype=compute_dtype,
        logits_sharding=sharding.named("batch", None, "vocab"),
    )


@functools.partial(jax.jit, static_argnames=("config", "compute_dtype", "sharding"))
def _language_model_hidden(parameters, tokens_BxT, *, config, compute_dtype, sharding):
    hidden_BxTxD, _ = language_model.features(
        parameters, config, tokens_BxT, compute_dtype=compute_dtype, activations=sharding.activations
    )
    return _replicated(hidden_BxTxD, sharding)


@functools.partial(jax.jit, static_argnames=("compute_dtype", "sharding"))
def _language_model_rows(parameters, hidden_BxD, *, compute_dtype, sharding):
    logits_BxV = transformer.project(hidden_BxD, language_model.output_kernel(parameters), compute_dtype)
    return _replicated(jax.nn.softmax(logits_BxV), sharding)


def _replicated(array: jax.Array, sharding: Sharding) -> jax.Array:
    """Replicates an array on every device, so that every process can read all of it."""
    return jax.lax.with_sharding_constraint(array, sharding.named())


def _in_chunks(
    call: Callable[..., jax.Array], arrays: tuple[np.ndarray, ...], chunk: int, sharding: Sharding
) -> np.ndarray:
    """Calls call(*rows) on chunks of the arrays' first axis, of about `chunk` rows.

    The rows of a chunk are a multiple of the batch shards; the last chunk is padded by repeating its last row.
    """
    shards = sharding.shards("batch")
    chunk = -(-max(1, min(chunk, len(arrays[0]))) // shards) * shards
    pending, results = None, []
    for rows, length in _padded_chunks(arrays, chunk):
        result = call(*(_on_mesh(array, sharding) for array in rows))
        if pending is not None:  # fetched only once the next chunk is running
            results.append(np.asarray(pending[0])[: pending[1]])
        pending = result, length
    results.append(np.asarray(pending[0])[: pending[1]])
    return np.concatenate(results)


def _padded_chunks(arrays: tuple[np.ndarray, ...], chunk: int) -> Iterator[tuple[list[np.ndarray], int]]:
    for first in range(0, len(arrays[0]), chunk):
        rows = [array[first : first + chunk] for array in arrays]
        length = len(rows[0])
        widths = [((0, chunk - length), *[(0, 0)] * (array.ndim - 1)) for array in rows]
        yield [np.pad(array, width, mode="edge") for array, width in zip(rows, widths, strict=True)], length


def _on_mesh(rows: np.ndarray, sharding: Sharding) -> jax.Array:
    """Shards rows over the mesh; every process has all rows and provides those of its devices."""
    return jax.make_array_from_callback(rows.shape, sharding.rows(rows.ndim), lambda index: rows[index])
