"""Greedy decoding of a system: a mixture whose parts may come from two language models and a search.

Dimensions: B prompts, T positions, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from mlpmem_jax.comparison.reading import Model
from mlpmem_jax.comparison.sides import Side
from mlpmem_jax.core.progress import progress
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.inference import decoding
from mlpmem_jax.inference.decoding import DecoderConfig, Parameters

_BATCH = 16  # prompts decoded together
_PROMPT_MULTIPLE = 64


class Decoder:
    """A language model with its decoding state; each step returns log p and the hidden states that a side reads."""

    def __init__(self, model: Model, side: Side | None, sharding: Sharding):
        """Wraps a model that is on the mesh of `sharding`; results are replicated on every device."""
        self._sharding = sharding
        self._models = DecoderConfig(model.config, None, side.block if side else 0)
        self._parameters = decoding.prepare(Parameters(model.parameters))
        self.side = side

    def start(self, tokens_BxT: np.ndarray, padding_B: np.ndarray, room: int) -> decoding.Reading:
        reading, self._cache = _prefill(self._models, self._parameters, tokens_BxT, padding_B, room, self._sharding)
        return reading

    def step(self, tokens_B: np.ndarray) -> decoding.Reading:
        reading, self._cache = _step(self._models, self._parameters, self._cache, tokens_B, self._sharding)
        return reading


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _prefill(models, parameters, tokens_BxT, padding_B, room, sharding):
    reading, cache = decoding.prefill(models, parameters, tokens_BxT, padding_B, room)
    return jax.lax.with_sharding_constraint(reading, sharding.named()), cache


@functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def _step(models, parameters, cache, tokens_B, sharding):
    reading, cache = decoding.step(models, parameters, cache, tokens_B)
    return jax.lax.with_sharding_constraint(reading, sharding.named()), cache


@dataclasses.dataclass(frozen=True)
class Ending:
    """Where a generated text ends: at the end-of-text token, or before the first of the strings `stops`."""

    tokenizer: tokenizers.Tokenizer
    end_token: int
    stops: Sequence[str]

    def is_reached(self, ids: list[int]) -> bool:
        """Whether generated token ids, at least one, are a complete text."""
        return ids[-1] == self.end_token or any(stop in self.tokenizer.decode(ids) for stop in self.stops)

    def text(self, ids: list[int]) -> str:
        """The text of generated token ids, up to its end."""
        text = self.tokenizer.decode([token for token in ids if token != self.end_token])
        return text[: min((text.index(stop) for stop in self.stops if stop in text), default=len(text))]


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
      decoder: the language model's decoder.
      side_decoder: decoder of the language model whose hidden states the side reads; may be `decoder` itself. None
        without a side.
      weight: lambda, the interpolation weight of the side.
      prompts: token ids, at least one each; each plus `count` tokens must fit the models' contexts.
      count: maximum number of tokens to add.
      is_finished: returns whether a text is complete, such as `Ending.is_reached`.
      name: label for progress output.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    texts: list[list[int]] = [[]] * len(prompts)
    mixture = Mixture(decoder, side_decoder, weight)
    with progress(len(prompts), name, "texts") as bar:
        for first in range(0, len(order), _BATCH):
            chosen = order[first : first + _BATCH]
            padded = chosen + [chosen[-1]] * (_BATCH - len(chosen))
            batch = _batch(mixture, [prompts[index] for index in padded], count, is_finished)
            for index, ids in zip(chosen, batch, strict=False):
                texts[index] = ids
            bar.advance(len(chosen))
    return texts


class Mixture:
    """Greedy decoding steps of a language model and the side mixed into it; arguments as in `generate`."""

    def __init__(self, decoder: Decoder, side_decoder: Decoder | None, weight: float):
        self._side_decoder, self._weight = side_decoder, weight
        self._decoders = [decoder] if side_decoder in (None, decoder) else [decoder, side_decoder]

    def start(self, prompts: Sequence[Sequence[int]], count: int) -> np.ndarray:
        """Prefills the prompts and returns the next token of each, int [B]; reserves room for `count` new tokens."""
        tokens_BxT, padding_B = decoding.left_padded(prompts, _PROMPT_MULTIPLE)
        room = tokens_BxT.shape[1] + count
        return self._likeliest([each.start(tokens_BxT, padding_B, room) for each in self._decoders])

    def step(self, tokens_B: np.ndarray) -> np.ndarray:
        """Appends a token to each text and returns the next ones, int [B]."""
        return self._likeliest([each.step(tokens_B) for each in self._decoders])

    def _likeliest(self, readings: list[decoding.Reading]) -> np.ndarray:
        base_log_BxV = readings[0].base_log_BxV
        if self._side_decoder is None:
            return np.asarray(jnp.argmax(base_log_BxV, axis=1))
        side = self._side_decoder.side
        side_log_BxV = side.distributions(readings[-1].memory_input_BxD, base_log_BxV.shape[1])
        return np.asarray(_argmax_of_mixture(base_log_BxV, jnp.asarray(side_log_BxV, jnp.float32), self._weight))


def _batch(mixture: Mixture, prompts, count, is_finished) -> list[list[int]]:
    texts, is_open_B = [[] for _ in prompts], np.ones(len(prompts), bool)
    tokens_B = mixture.start(prompts, count)
    for number in range(count):
        for row in np.flatnonzero(is_open_B):
            texts[row].append(int(tokens_B[row]))
            is_open_B[row] = not is_finished(texts[row])
        if not is_open_B.any() or number + 1 == count:
            break
        tokens_B = mixture.step(tokens_B)
    return texts


@jax.jit
def _argmax_of_mixture(base_log_BxV, side_log_BxV, weight) -> jax.Array:
    return jnp.argmax(decoding.mix(base_log_BxV, side_log_BxV, weight), axis=1)
