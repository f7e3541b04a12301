"""Log-probabilities of given tokens in given texts, with few forward passes and for every mixing weight at once.

Texts are packed (`packing`), so that what they have in common is computed once and few programs are compiled. Logits
are computed only at the scored positions.

Dimensions: B sequences of T positions, P scored positions of a text or a sequence, N of all sequences, J tokens scored
at a position, M in a sequence, A positions of the prefix, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mlpmem_jax.comparison import packing
from mlpmem_jax.comparison.packing import Batch, Row
from mlpmem_jax.comparison.sides import Side
from mlpmem_jax.core.progress import progress
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.inference import decoding
from mlpmem_jax.models import language_model, packed
from mlpmem_jax.models.packed import Layout, Prefix


@dataclasses.dataclass(frozen=True)
class Model:
    """A language model on the mesh, with parameters as `saved.load_language_model` returns them."""

    parameters: dict
    config: language_model.Config


def read(
    model: Model, rows: Sequence[Row], sides: dict[str, Side], sharding: Sharding, name: str
) -> tuple[dict[str, list[np.ndarray]], dict[str, float]]:
    """Log-probabilities of texts by the language model, and by the sides that read its hidden states.

    Args:
      model: the language model.
      rows: the texts, those of a question adjacent; none longer than the model's context.
      sides: what else reads the model's hidden states, by name.
      sharding: the model's sharding.
      name: label for progress output.

    Returns:
      Log-probabilities, float [P, J] for each row, and the seconds that they took: the language model's under "model",
      each side's, without the language model's, under its name.
    """
    input_blocks = tuple(sorted({side.block for side in sides.values()}))
    log_probabilities = {source: [np.zeros(0)] * len(rows) for source in ("model", *sides)}
    seconds = dict.fromkeys(log_probabilities, 0.0)
    with progress(len(rows), name, "texts") as bar:
        start = time.perf_counter()
        for batch, prefix in _batches(model, rows, sharding):
            log_BxM, block_inputs = _read(
                model.parameters,
                Layout(*_placed(sharding, *batch.layout)),
                *_placed(sharding, batch.reads_BxP, batch.places_BxM, batch.ids_BxM),
                prefix,
                config=model.config,
                input_blocks=input_blocks,
                sharding=sharding,
            )
            for source in log_probabilities:
                side = sides.get(source)
                values = side.log_probabilities(block_inputs[side.block], *_flat(batch)) if side else log_BxM
                values_BxM = np.asarray(values).reshape(batch.ids_BxM.shape)
                for row, values_PxJ in _unpacked(batch, values_BxM, rows):
                    log_probabilities[source][row] = values_PxJ
                start, seconds[source] = (end := time.perf_counter()), seconds[source] + end - start
            bar.advance(len(batch.parts))
    return log_probabilities, seconds


def read_mixture(
    model: Model, rows: Sequence[Row], side: Side | None, weight: float, sharding: Sharding, name: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Log-probabilities of a mixture, float [P, J] for each row, and whether each token is the argmax, bool [P, J].

    Unlike `read`, this computes whole distributions.

    Args:
      model: the language model.
      rows: the texts, those of a question adjacent; none longer than the model's context.
      side: what is mixed in; None = nothing.
      weight: lambda, the interpolation weight of the side.
      sharding: the model's sharding.
      name: label for progress output.
    """
    input_blocks = (side.block,) if side else ()
    log_probabilities: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0), np.zeros(0, bool))] * len(rows)
    with progress(len(rows), name, "texts") as bar:
        for batch, prefix in _batches(model, rows, sharding):
            log_NxV, block_inputs = _distributions(
                model.parameters,
                Layout(*_placed(sharding, *batch.layout)),
                *_placed(sharding, batch.reads_BxP),
                prefix,
                config=model.config,
                input_blocks=input_blocks,
                sharding=sharding,
            )
            if side and weight:
                side_NxV = side.distributions(block_inputs[side.block], log_NxV.shape[-1])
                log_NxV = decoding.mix(log_NxV, jnp.asarray(side_NxV, jnp.float32), weight)
            places_M, ids_M = _flat(batch)
            scored_BxM = np.asarray(log_NxV[places_M, ids_M]).reshape(batch.ids_BxM.shape)
            likeliest_M = np.asarray(jnp.argmax(log_NxV, axis=1))[places_M]
            is_likeliest_BxM = (likeliest_M == ids_M).reshape(batch.ids_BxM.shape)
            for (row, values_PxJ), (_, is_likeliest_PxJ) in zip(
                _unpacked(batch, scored_BxM, rows), _unpacked(batch, is_likeliest_BxM, rows), strict=True
            ):
                log_probabilities[row] = values_PxJ, is_likeliest_PxJ
            bar.advance(len(batch.parts))
    return log_probabilities


def _batches(model: Model, rows: Sequence[Row], sharding: Sharding) -> Iterator[tuple[Batch, Prefix | None]]:
    """Batches of rows, each with the computed prefix of its texts."""
    tokens_A, shards = packing.shared_prefix(rows), sharding.shards("batch")
    has_prefix = [bool(tokens_A) and packing.begins_with(row, tokens_A) for row in rows]
    if tokens_A:
        array_A = np.array(tokens_A, np.int32)
        array_A = jax.make_array_from_callback(array_A.shape, sharding.named(), lambda index: array_A[index])
        prefix = _prefix(model.parameters, array_A, config=model.config, sharding=sharding)
        numbers = [number for number, has in enumerate(has_prefix) if has]
        for batch in packing.batches(rows, numbers, len(tokens_A), shards):
            yield batch, prefix
    for batch in packing.batches(rows, [number for number, has in enumerate(has_prefix) if not has], 0, shards):
        yield batch, None


def _flat(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """For each scored token (the index of its position among the N scored ones, the token), int32 [B * M]."""
    firsts_Bx1 = batch.reads_BxP.shape[1] * np.arange(len(batch.places_BxM), dtype=np.int32)[:, None]
    return (batch.places_BxM + firsts_Bx1).ravel(), batch.ids_BxM.ravel()


def _unpacked(batch: Batch, values_BxM: np.ndarray, rows: Sequence[Row]) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (number of a row, its values [P, J])."""
    for row, sequence, start in batch.parts:
        positions, choices = rows[row].shape
        values = values_BxM[sequence, start : start + positions * choices]
        yield row, values.reshape(positions, choices)


def _placed(sharding: Sharding, *arrays: np.ndarray) -> list[jax.Array]:
    """Replicates on the mesh arrays that every process holds in full."""
    return [
        jax.make_array_from_callback(array.shape, sharding.rows(array.ndim), lambda index, a=array: a[index])
        for array in arrays
    ]


@functools.partial(jax.jit, static_argnames=("config", "sharding"))
def _prefix(parameters, tokens_A, *, config, sharding) -> Prefix:
    """The texts' common prefix, computed and replicated on every device."""
    return jax.lax.with_sharding_constraint(packed.read_prefix(parameters, config, tokens_A), sharding.named())


def _at_positions(parameters, layout, reads_BxP, prefix, config, input_blocks):
    """(logits [B, P, V], {block: hidden states [N, D]}) at the scored positions."""
    final_BxTxD, block_inputs = packed.features(parameters, config, layout, prefix, input_blocks)

    def taken(states_BxTxD):
        return jnp.take_along_axis(states_BxTxD, reads_BxP[:, :, None], axis=1)

    logits_BxPxV = language_model.vocabulary_logits(parameters, config, taken(final_BxTxD))
    return logits_BxPxV, {block: taken(states).reshape(-1, states.shape[-1]) for block, states in block_inputs.items()}


@functools.partial(jax.jit, static_argnames=("config", "input_blocks", "sharding"))
def _read(parameters, layout, reads_BxP, places_BxM, ids_BxM, prefix, *, config, input_blocks, sharding):
    """(log-probabilities [B, M], {block: hidden states [N, D]}), both replicated."""
    logits_BxPxV, block_inputs = _at_positions(parameters, layout, reads_BxP, prefix, config, input_blocks)
    sums_BxP = jax.nn.logsumexp(logits_BxPxV, axis=2)

    def scored(logits_PxV, sums_P, places_M, ids_M):
        return logits_PxV[places_M, ids_M] - sums_P[places_M]

    log_BxM = jax.vmap(scored)(logits_BxPxV, sums_BxP, places_BxM, ids_BxM)
    return jax.lax.with_sharding_constraint((log_BxM, block_inputs), sharding.named())


@functools.partial(jax.jit, static_argnames=("config", "input_blocks", "sharding"))
def _distributions(parameters, layout, reads_BxP, prefix, *, config, input_blocks, sharding):
    """(log-probabilities [N, V], {block: hidden states [N, D]}), both replicated."""
    logits_BxPxV, block_inputs = _at_positions(parameters, layout, reads_BxP, prefix, config, input_blocks)
    log_NxV = jax.nn.log_softmax(logits_BxPxV).reshape(-1, logits_BxPxV.shape[-1])
    return jax.lax.with_sharding_constraint((log_NxV, block_inputs), sharding.named())
