"""Log-probabilities of given tokens in given texts, with few forward passes and for every mixing weight at once.

Texts are packed (`packing`), so that what they have in common is computed once and few programs are compiled. Logits
are computed only at the scored positions.

Dimensions: B sequences of T positions, U scored positions in each, R in all, P scored positions in a text, C tokens
scored at each, Q tokens scored in a sequence, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
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
) -> dict[str, list[np.ndarray]]:
    """Log-probabilities, float [P, C] for each row: the language model's under "model", each side's under its name.

    Args:
      model: the language model.
      rows: the texts, those of a question adjacent; none longer than the model's context.
      sides: what else reads the model's hidden states, by name.
      sharding: the model's sharding.
      name: label for progress output.
    """
    input_blocks = tuple(sorted({side.block for side in sides.values()}))
    log_probabilities = {source: [np.zeros(0)] * len(rows) for source in ("model", *sides)}
    with progress(len(rows), name, "texts") as bar:
        for batch, prefix in _batches(model, rows, sharding):
            log_BxQ, block_inputs = _read(
                model.parameters,
                Layout(*_placed(sharding, *batch.layout)),
                *_placed(sharding, batch.reads_BxU, batch.places_BxQ, batch.ids_BxQ),
                prefix,
                config=model.config,
                input_blocks=input_blocks,
                sharding=sharding,
            )
            computed = {"model": log_BxQ}
            for source, side in sides.items():
                computed[source] = side.log_probabilities(block_inputs[side.block], *_flat(batch))
            for source, values in computed.items():
                values_BxQ = np.asarray(values).reshape(batch.ids_BxQ.shape)
                for row, values_PxC in _unpacked(batch, values_BxQ, rows):
                    log_probabilities[source][row] = values_PxC
            bar.advance(len(batch.parts))
    return log_probabilities


def read_mixture(
    model: Model, rows: Sequence[Row], side: Side | None, weight: float, sharding: Sharding, name: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Log-probabilities of a mixture, float [P, C] for each row, and whether each token is the argmax, bool [P, C].

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
            log_RxV, block_inputs = _distributions(
                model.parameters,
                Layout(*_placed(sharding, *batch.layout)),
                *_placed(sharding, batch.reads_BxU),
                prefix,
                config=model.config,
                input_blocks=input_blocks,
                sharding=sharding,
            )
            if side and weight:
                side_RxV = side.distributions(block_inputs[side.block], log_RxV.shape[-1])
                log_RxV = decoding.mix(log_RxV, jnp.asarray(side_RxV, jnp.float32), weight)
            places_Q, ids_Q = _flat(batch)
            scored_BxQ = np.asarray(log_RxV[places_Q, ids_Q]).reshape(batch.ids_BxQ.shape)
            likeliest_Q = np.asarray(jnp.argmax(log_RxV, axis=1))[places_Q]
            is_likeliest_BxQ = (likeliest_Q == ids_Q).reshape(batch.ids_BxQ.shape)
            for (row, values_PxC), (_, is_likeliest_PxC) in zip(
                _unpacked(batch, scored_BxQ, rows), _unpacked(batch, is_likeliest_BxQ, rows), strict=True
            ):
                log_probabilities[row] = values_PxC, is_likeliest_PxC
            bar.advance(len(batch.parts))
    return log_probabilities


def _batches(model: Model, rows: Sequence[Row], sharding: Sharding) -> Iterator[tuple[Batch, Prefix | None]]:
    """Batches of rows, each with the computed prefix of its texts."""
    tokens_P, shards = packing.shared_prefix(rows), sharding.shards("batch")
    has_prefix = [bool(tokens_P) and packing.begins_with(row, tokens_P) for row in rows]
    if tokens_P:
        array_P = np.array(tokens_P, np.int32)
        array_P = jax.make_array_from_callback(array_P.shape, sharding.named(), lambda index: array_P[index])
        prefix = _prefix(model.parameters, array_P, config=model.config, sharding=sharding)
        numbers = [number for number, has in enumerate(has_prefix) if has]
        for batch in packing.batches(rows, numbers, len(tokens_P), shards):
            yield batch, prefix
    for batch in packing.batches(rows, [number for number, has in enumerate(has_prefix) if not has], 0, shards):
        yield batch, None


def _flat(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """For each scored token (the index of its position among the R scored ones, the token), int32 [B * Q]."""
    firsts_Bx1 = batch.reads_BxU.shape[1] * np.arange(len(batch.places_BxQ), dtype=np.int32)[:, None]
    return (batch.places_BxQ + firsts_Bx1).ravel(), batch.ids_BxQ.ravel()


def _unpacked(batch: Batch, values_BxQ: np.ndarray, rows: Sequence[Row]) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (number of a row, its values [P, C])."""
    for row, sequence, start in batch.parts:
        positions, choices = rows[row].shape
        values = values_BxQ[sequence, start : start + positions * choices]
        yield row, values.reshape(positions, choices)


def _placed(sharding: Sharding, *arrays: np.ndarray) -> list[jax.Array]:
    """Replicates on the mesh arrays that every process holds in full."""
    return [
        jax.make_array_from_callback(array.shape, sharding.rows(array.ndim), lambda index, a=array: a[index])
        for array in arrays
    ]


@functools.partial(jax.jit, static_argnames=("config", "sharding"))
def _prefix(parameters, tokens_P, *, config, sharding) -> Prefix:
    """The texts' common prefix, computed and replicated on every device."""
    return jax.lax.with_sharding_constraint(packed.read_prefix(parameters, config, tokens_P), sharding.named())


def _at_positions(parameters, layout, reads_BxU, prefix, config, input_blocks):
    """(logits [B, U, V], {block: hidden states [R, D]}) at the scored positions."""
    final_BxTxD, block_inputs = packed.features(parameters, config, layout, prefix, input_blocks)

    def taken(states_BxTxD):
        return jnp.take_along_axis(states_BxTxD, reads_BxU[:, :, None], axis=1)

    logits_BxUxV = language_model.vocabulary_logits(parameters, config, taken(final_BxTxD))
    return logits_BxUxV, {block: taken(states).reshape(-1, states.shape[-1]) for block, states in block_inputs.items()}


@functools.partial(jax.jit, static_argnames=("config", "input_blocks", "sharding"))
def _read(parameters, layout, reads_BxU, places_BxQ, ids_BxQ, prefix, *, config, input_blocks, sharding):
    """(log-probabilities [B, Q], {block: hidden states [R, D]}), both replicated."""
    logits_BxUxV, block_inputs = _at_positions(parameters, layout, reads_BxU, prefix, config, input_blocks)
    sums_BxU = jax.nn.logsumexp(logits_BxUxV, axis=2)

    def scored(logits_UxV, sums_U, places_Q, ids_Q):
        return logits_UxV[places_Q, ids_Q] - sums_U[places_Q]

    log_BxQ = jax.vmap(scored)(logits_BxUxV, sums_BxU, places_BxQ, ids_BxQ)
    return jax.lax.with_sharding_constraint((log_BxQ, block_inputs), sharding.named())


@functools.partial(jax.jit, static_argnames=("config", "input_blocks", "sharding"))
def _distributions(parameters, layout, reads_BxU, prefix, *, config, input_blocks, sharding):
    """(log-probabilities [R, V], {block: hidden states [R, D]}), both replicated."""
    logits_BxUxV, block_inputs = _at_positions(parameters, layout, reads_BxU, prefix, config, input_blocks)
    log_RxV = jax.nn.log_softmax(logits_BxUxV).reshape(-1, logits_BxUxV.shape[-1])
    return jax.lax.with_sharding_constraint((log_RxV, block_inputs), sharding.named())
