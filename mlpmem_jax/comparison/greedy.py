"""Texts of a system: greedy decoding of a mixture whose parts may come from two language models and a search.

Dimensions: B prompts, T positions, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mlpmem_jax.comparison.reading import Model
from mlpmem_jax.comparison.sides import Side
from mlpmem_jax.core.progress import progress
from mlpmem_jax.inference import decoding
from mlpmem_jax.inference.decoding import DecoderConfig, Parameters

_BATCH = 16  # prompts at once
_MULTIPLE = 64  # prompts are padded to whole multiples, so that few lengths are compiled


class Decoder:
    """A language model with the state that decoding needs; it tells log p and the input of a side."""

    def __init__(self, model: Model, side: Side | None):
        self._models = DecoderConfig(model.config, None, side.block if side else 0)
        self._parameters = decoding.prepare(Parameters(model.parameters))
        self.side = side

    def start(self, tokens_BxT: np.ndarray, padding_B: np.ndarray, room: int) -> decoding.Reading:
        reading, self._cache = _prefill(self._models, self._parameters, tokens_BxT, padding_B, room)
        return reading

    def step(self, tokens_B: np.ndarray) -> decoding.Reading:
        reading, self._cache = _step(self._models, self._parameters, self._cache, tokens_B)
        return reading


_prefill = jax.jit(decoding.prefill, static_argnums=(0, 4))
_step = jax.jit(decoding.step, static_argnums=0, donate_argnums=2)


def generate(
    decoder: Decoder,
    side_decoder: Decoder | None,
    weight: float,
    prompts: Sequence[Sequence[int]],
    count: int,
    is_finished: Callable[[list[int]], bool],
    name: str,
) -> list[list[int]]:
    """Greedy continuations, at most `count` tokens each.

    Args:
      decoder: of the language model.
      side_decoder: of the language model whose states the side reads; None without a side. May be `decoder` itself.
      weight: lambda of the side.
      prompts: token ids, at least one each; with `count` more they fit the contexts of the models.
      count: most tokens to add.
      is_finished: whether a text needs no more tokens.
      name: what the user is told is being written.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    texts: list[list[int]] = [[]] * len(prompts)
    with progress(len(prompts), name, "texts") as bar:
        for first in range(0, len(order), _BATCH):
            chosen = order[first : first + _BATCH]
            padded = chosen + [chosen[-1]] * (_BATCH - len(chosen))
            batch = _batch(decoder, side_decoder, weight, [prompts[index] for index in padded], count, is_finished)
            for index, ids in zip(chosen, batch, strict=False):
                texts[index] = ids
            bar.advance(len(chosen))
    return texts


def _batch(decoder, side_decoder, weight, prompts, count, is_finished) -> list[list[int]]:
    length = -(-max(map(len, prompts)) // _MULTIPLE) * _MULTIPLE
    tokens_BxT = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(tokens_BxT, prompts, strict=True):
        row[length - len(prompt) :] = prompt
    padding_B = np.array([length - len(prompt) for prompt in prompts], np.int32)
    decoders = [decoder] if side_decoder in (None, decoder) else [decoder, side_decoder]
    readings = [one.start(tokens_BxT, padding_B, length + count) for one in decoders]
    texts, is_open_B = [[] for _ in prompts], np.ones(len(prompts), bool)
    for number in range(count):
        tokens_B = np.asarray(_likeliest(readings, side_decoder, weight))
        for row in np.flatnonzero(is_open_B):
            texts[row].append(int(tokens_B[row]))
            is_open_B[row] = not is_finished(texts[row])
        if not is_open_B.any() or number + 1 == count:
            break
        readings = [one.step(tokens_B) for one in decoders]
    return texts


def _likeliest(readings, side_decoder, weight) -> jax.Array:
    base_log_BxV = readings[0].base_log_BxV
    if side_decoder is None:
        return jnp.argmax(base_log_BxV, axis=1)
    side_log_BxV = side_decoder.side.distributions(readings[-1].memory_input_BxD, base_log_BxV.shape[1])
    return _argmax_of_mixture(base_log_BxV, jnp.asarray(side_log_BxV, jnp.float32), weight)


@functools.partial(jax.jit)
def _argmax_of_mixture(base_log_BxV, side_log_BxV, weight) -> jax.Array:
    return jnp.argmax(decoding.mix(base_log_BxV, side_log_BxV, weight), axis=1)
