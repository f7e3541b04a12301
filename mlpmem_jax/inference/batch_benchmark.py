"""Time per token of batches and of long prompts, next to transformers on the same cores; random weights.

GPT-2 small with the paper's memory for it, and a Llama of SmolLM2-135M's dimensions with a memory of 4 blocks. Nearly
flat random distributions are the worst case of greedy generation: every step needs the memory. transformers (extra
`torch`) runs the base alone, step by step on a cache that it filled before.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mlpmem_jax.core import host
from mlpmem_jax.core.benchmark_rows import row, seconds_by_round
from mlpmem_jax.core.errors import UserError, require
from mlpmem_jax.core.progress import say
from mlpmem_jax.inference.decoding import DecoderConfig, Parameters, prepare, weights_dtype
from mlpmem_jax.inference.generate import first_tokens, following_tokens
from mlpmem_jax.inference.sampling import GREEDY
from mlpmem_jax.models import language_model, memory
from mlpmem_jax.models.memory import MemoryConfig
from mlpmem_jax.retrieval import forward_benchmark

MEMORIES = {
    "GPT-2 small": MemoryConfig("gpt2", 50_257, 50_304, 768, 768, blocks=18, feed_forward_width=3072),
    "SmolLM2-135M": MemoryConfig("llama", 49_152, 49_152, 576, 576, blocks=4, feed_forward_width=1536),
}
CASES = (1, 512), (8, 512), (32, 512), (1, 2048)  # sequences in the batch, tokens of each prompt
COUNT, ROUNDS = 32, 3
_WEIGHT = 0.25


def rows(config: ml_collections.ConfigDict) -> Iterator[dict]:
    """Rows of (name, value, unit, detail). Sizes do not depend on the config. Takes about ten minutes on two cores."""
    del config
    room = max(prompt for _, prompt in CASES) + COUNT
    for name, memory_model in MEMORIES.items():
        base = dataclasses.replace(forward_benchmark.MODELS[name], context_length=room)
        both = prepare(
            Parameters(
                language_model.init(base, jax.random.key(0)), memory.init(memory_model, jax.random.key(1)), _WEIGHT
            ),
            weights_dtype("bfloat16"),
        )
        try:
            theirs = _their_model(base)
        except UserError as error:
            say(f"batches: rows of {name} come without transformers: {error}")
            theirs = None
        for batch, prompt in CASES:
            tokens_BxT = np.random.default_rng(0).integers(0, base.vocab_size, (batch, prompt), dtype=np.int32)
            calls = {
                "alone": _steps(DecoderConfig(base), Parameters(both.base), tokens_BxT),
                "with memory": _steps(DecoderConfig(base, memory_model, base.blocks), both, tokens_BxT),
            }
            if theirs is not None:
                calls["transformers"] = _their_steps(theirs, tokens_BxT)
            seconds = seconds_by_round(calls, ROUNDS)
            detail = f"base alone {_milliseconds(seconds['alone']):.1f} ms"
            if theirs is not None:
                detail += f", in transformers {_milliseconds(seconds['transformers']):.1f} ms"
            ratio = np.median(seconds["with memory"] / seconds["alone"])
            yield row(
                f"next token, {name} with memory, batch {batch}, prompt of {prompt:,}",
                _milliseconds(seconds["with memory"]),
                "ms",
                f"{ratio:.2f} times the base alone; {detail}; greedy, mean of {COUNT - 1} steps, {ROUNDS} rounds",
            )


def _milliseconds(seconds_R: np.ndarray) -> float:
    """The median time of one of COUNT - 1 steps."""
    return 1e3 * float(np.median(seconds_R)) / (COUNT - 1)


def _steps(models: DecoderConfig, parameters: Parameters, tokens_BxT: np.ndarray) -> Callable[[], jax.Array]:
    """A call that generates COUNT - 1 tokens after the first one of each prompt."""
    key, room = jax.random.key(0), tokens_BxT.shape[1] + COUNT
    padding_B = jnp.zeros(len(tokens_BxT), jnp.int32)
    tokens_B, cache = first_tokens(models, parameters, tokens_BxT, padding_B, key, room=room, sampling=GREEDY)
    return functools.partial(
        following_tokens, models, parameters, cache, tokens_B, key, -1, count=COUNT, sampling=GREEDY
    )


def _their_model(base: language_model.Config):
    """The base in transformers, on this machine's CPU.

    Raises:
      UserError: PyTorch or transformers is not installed, or JAX runs on another device.
    """
    torch, transformers = (require(name, extra="torch") for name in ("torch", "transformers"))
    if jax.default_backend() != "cpu":
        raise UserError(f"they need a CPU, but JAX runs on {jax.default_backend()}")
    torch.set_num_threads(host.cpu_count())
    return forward_benchmark.causal_model(transformers, base)


def _their_steps(model, tokens_BxT: np.ndarray) -> Callable[[], object]:
    """The same call as `_steps`, in transformers."""
    torch = require("torch", extra="torch")
    with torch.inference_mode():
        filled = model(torch.from_numpy(tokens_BxT).long(), use_cache=True, logits_to_keep=1)
    cache, first_Bx1 = filled.past_key_values, filled.logits[:, -1:].argmax(-1)

    @torch.inference_mode()
    def steps():
        if added := cache.get_seq_length() - tokens_BxT.shape[1]:
            cache.crop(-added)
        tokens_Bx1 = first_Bx1
        for _ in range(COUNT - 1):
            tokens_Bx1 = model(tokens_Bx1, past_key_values=cache).logits.argmax(-1)
        return tokens_Bx1.numpy()

    return steps
