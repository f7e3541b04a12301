"""Log-probabilities of given tokens in given texts: one forward pass a batch, whatever is mixed with the model later.

Texts are sorted by length and padded on the right to a few lengths, so that few programs are compiled. Logits exist at
the positions that are read and nowhere else.

Dimensions: B texts of T positions, P positions read in each, C tokens asked for at each, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mlpmem_jax.comparison.sides import Side
from mlpmem_jax.core.progress import progress
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.models import language_model

_LENGTHS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
_POSITIONS_AT_ONCE = 2048  # in a forward pass, for each shard of the batch
_READ_AT_ONCE = 512  # positions of a pass at which logits exist, for each shard of the batch


@dataclasses.dataclass(frozen=True)
class Row:
    """One text and what is read in it.

    Attributes:
      tokens_T: token ids.
      positions_P: after which the tokens are predicted.
      ids_PxC: tokens whose log-probabilities are asked for.
    """

    tokens_T: Sequence[int]
    positions_P: Sequence[int]
    ids_PxC: Sequence[Sequence[int]]

    @classmethod
    def of_continuation(cls, prompt: Sequence[int], whole: Sequence[int]) -> Row:
        """Every token of a text after its prompt; the text's tokens need not begin with the prompt's."""
        first = min(len(prompt), len(whole) - 1)
        return cls(whole[:-1], range(first - 1, len(whole) - 1), [[token] for token in whole[first:]])

    @classmethod
    def of_next(cls, prompt: Sequence[int], ids: Sequence[int]) -> Row:
        """Several tokens as the one after a prompt."""
        return cls(prompt, [len(prompt) - 1], [list(ids)])

    def truncated(self, length: int) -> Row:
        """The last `length` tokens, with the positions among them."""
        excess = max(0, len(self.tokens_T) - length)
        kept = [index for index, position in enumerate(self.positions_P) if position >= excess]
        return Row(
            self.tokens_T[excess:],
            [self.positions_P[index] - excess for index in kept],
            [self.ids_PxC[index] for index in kept],
        )


@dataclasses.dataclass(frozen=True)
class Model:
    """A language model on the mesh, with parameters as `saved.load_language_model` gives them."""

    parameters: dict
    config: language_model.Config
    compute_dtype: str = "float32"


def read(
    model: Model, rows: Sequence[Row], sides: dict[str, Side], sharding: Sharding, name: str
) -> dict[str, list[np.ndarray]]:
    """Log-probabilities, float [P, C] of each row: the language model's under "model", each side's under its name.

    Args:
      model: what reads.
      rows: in any order; none longer than the model's context.
      sides: what reads the model's hidden states besides its own output projection, by name.
      sharding: of the model.
      name: what the user is told is being read.
    """
    input_blocks = tuple(sorted({side.block for side in sides.values()}))
    found = {source: [np.zeros(0)] * len(rows) for source in ("model", *sides)}
    with progress(len(rows), name, "texts") as bar:
        for chosen, tokens_BxT, positions_BxP, ids_BxPxC in _batches(rows, sharding.shards("batch")):
            log_BxPxC, block_inputs = _read(
                model.parameters,
                *_placed(sharding, tokens_BxT, positions_BxP, ids_BxPxC),
                config=model.config,
                input_blocks=input_blocks,
                compute_dtype=jnp.dtype(model.compute_dtype),
                sharding=sharding,
            )
            computed = {"model": log_BxPxC}
            for source, side in sides.items():
                computed[source] = side.log_probabilities(block_inputs[side.block], ids_BxPxC)
            for source, values_BxPxC in computed.items():
                values_BxPxC = np.asarray(values_BxPxC)
                for row, values_PxC in zip(chosen, values_BxPxC, strict=False):
                    ids_PxC = rows[row].ids_PxC
                    found[source][row] = values_PxC[: len(ids_PxC), : len(ids_PxC[0]) if ids_PxC else 0]
            bar.advance(len(chosen))
    return found


def read_mixture(
    model: Model, rows: Sequence[Row], side: Side | None, weight: float, sharding: Sharding, name: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Log-probabilities of a mixture, float [P, C] of each row, and whether each is the likeliest token, bool [P, C].

    Whole distributions are computed, which `read` does without.

    Args:
      model: what reads.
      rows: in any order; none longer than the model's context.
      side: what is mixed in; None = nothing.
      weight: lambda of the side.
      sharding: of the model.
      name: what the user is told is being read.
    """
    input_blocks = (side.block,) if side else ()
    found: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0), np.zeros(0, bool))] * len(rows)
    with progress(len(rows), name, "texts") as bar:
        for chosen, tokens_BxT, positions_BxP, ids_BxPxC in _batches(rows, sharding.shards("batch")):
            log_BxPxV, block_inputs = _distributions(
                model.parameters,
                *_placed(sharding, tokens_BxT, positions_BxP),
                config=model.config,
                input_blocks=input_blocks,
                compute_dtype=jnp.dtype(model.compute_dtype),
                sharding=sharding,
            )
            if side and weight:
                states_BxPxD = block_inputs[side.block]
                side_QxV = side.distributions(states_BxPxD.reshape(-1, states_BxPxD.shape[-1]), log_BxPxV.shape[-1])
                side_BxPxV = jnp.asarray(side_QxV, jnp.float32).reshape(log_BxPxV.shape)
                log_BxPxV = jnp.logaddexp(jnp.log(weight) + side_BxPxV, jnp.log1p(-weight) + log_BxPxV)
            chosen_BxPxC = np.asarray(jnp.take_along_axis(log_BxPxV, jnp.asarray(ids_BxPxC), axis=2))
            likeliest_BxPx1 = np.asarray(jnp.argmax(log_BxPxV, axis=2))[..., None]
            for place, row in enumerate(chosen):
                size = len(rows[row].ids_PxC), len(rows[row].ids_PxC[0]) if rows[row].ids_PxC else 0
                part = place, slice(size[0]), slice(size[1])
                found[row] = chosen_BxPxC[part], (ids_BxPxC == likeliest_BxPx1)[part]
            bar.advance(len(chosen))
    return found


def _placed(sharding: Sharding, *arrays: np.ndarray) -> list[jax.Array]:
    """On the mesh, from arrays that every process holds whole."""
    return [
        jax.make_array_from_callback(array.shape, sharding.rows(array.ndim), lambda index, a=array: a[index])
        for array in arrays
    ]


def _at_positions(parameters, tokens_BxT, positions_BxP, config, input_blocks, compute_dtype):
    """(logits [B, P, V], {block: hidden states [B, P, D]}) at the positions that are read."""
    final_BxTxD, block_inputs = language_model.features(
        parameters, config, tokens_BxT, input_blocks=input_blocks, compute_dtype=compute_dtype
    )

    def taken(states_BxTxD):
        return jnp.take_along_axis(states_BxTxD, positions_BxP[:, :, None], axis=1)

    kernel_DxV = language_model.output_kernel(parameters).astype(compute_dtype)
    logits_BxPxV = jnp.dot(taken(final_BxTxD).astype(compute_dtype), kernel_DxV, preferred_element_type=jnp.float32)
    return logits_BxPxV, {block: taken(states) for block, states in block_inputs.items()}


@functools.partial(jax.jit, static_argnames=("config", "input_blocks", "compute_dtype", "sharding"))
def _read(parameters, tokens_BxT, positions_BxP, ids_BxPxC, *, config, input_blocks, compute_dtype, sharding):
    """(log-probabilities [B, P, C], {block: hidden states [B, P, D]}), both on every device."""
    logits_BxPxV, block_inputs = _at_positions(
        parameters, tokens_BxT, positions_BxP, config, input_blocks, compute_dtype
    )
    chosen_BxPxC = jnp.take_along_axis(logits_BxPxV, ids_BxPxC, axis=2)
    log_BxPxC = chosen_BxPxC - jax.nn.logsumexp(logits_BxPxV, axis=2, keepdims=True)
    return jax.lax.with_sharding_constraint((log_BxPxC, block_inputs), sharding.named())


@functools.partial(jax.jit, static_argnames=("config", "input_blocks", "compute_dtype", "sharding"))
def _distributions(parameters, tokens_BxT, positions_BxP, *, config, input_blocks, compute_dtype, sharding):
    """(log-probabilities [B, P, V], {block: hidden states [B, P, D]}), both on every device."""
    logits_BxPxV, block_inputs = _at_positions(
        parameters, tokens_BxT, positions_BxP, config, input_blocks, compute_dtype
    )
    return jax.lax.with_sharding_constraint((jax.nn.log_softmax(logits_BxPxV), block_inputs), sharding.named())


def _batches(rows: Sequence[Row], shards: int) -> Iterator[tuple[list[int], np.ndarray, np.ndarray, np.ndarray]]:
    """(indices of rows, tokens [B, T], positions [B, P], ids [B, P, C]), int32; B a multiple of `shards`.

    A batch that is not full repeats its last row.
    """
    order = sorted(range(len(rows)), key=lambda row: (_shape(rows[row]), row))
    first = 0
    while first < len(order):
        length, reads, choices = _shape(rows[order[first]])
        size = shards * max(1, min(_POSITIONS_AT_ONCE // length, _READ_AT_ONCE // reads))
        chosen = [row for row in order[first : first + size] if _shape(rows[row]) == (length, reads, choices)]
        first += len(chosen)
        tokens_BxT = np.zeros((size, length), np.int32)
        positions_BxP = np.zeros((size, reads), np.int32)
        ids_BxPxC = np.zeros((size, reads, choices), np.int32)
        for place in range(size):
            row = rows[chosen[min(place, len(chosen) - 1)]]
            tokens_BxT[place, : len(row.tokens_T)] = row.tokens_T
            positions_BxP[place, : len(row.positions_P)] = row.positions_P
            if row.ids_PxC:
                ids_BxPxC[place, : len(row.ids_PxC), : len(row.ids_PxC[0])] = row.ids_PxC
        yield chosen, tokens_BxT, positions_BxP, ids_BxPxC


def _shape(row: Row) -> tuple[int, int, int]:
    """Positions, positions read and choices, each rounded up to one of a few numbers."""
    length = next((length for length in _LENGTHS if length >= len(row.tokens_T)), -(-len(row.tokens_T) // 1024) * 1024)
    reads, choices = max(1, len(row.positions_P)), max(1, len(row.ids_PxC[0]) if row.ids_PxC else 1)
    return length, _power_of_two(reads, at_least=4 if reads > 1 else 1), _power_of_two(choices)


def _power_of_two(number: int, at_least: int = 1) -> int:
    return max(at_least, 1 << (number - 1).bit_length())
