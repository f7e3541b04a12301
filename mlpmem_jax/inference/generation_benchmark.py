"""What a memory costs on top of its language model: time to the first token and per next token, with random weights.

GPT-2 small (124M parameters) and the paper's memory for it (18 blocks of width 768, 124M), batch 1; float32 on CPUs,
bfloat16 elsewhere. Nearly flat random distributions are the worst case of greedy generation: every step needs the
memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

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
from mlpmem_jax.inference.sampling import GREEDY, Sampling
from mlpmem_jax.models import flops, gpt2, language_model, memory

BASE = gpt2.GPT2Config(vocab_size=50257, context_length=1024, width=768, blocks=12, heads=12)
MEMORY = memory.MemoryConfig("gpt2", 50257, 50304, input_width=768, width=768, blocks=18, feed_forward_width=3072)
WEIGHT = 0.25  # the paper's interpolation weight on WikiText-103
HIGH_WEIGHT = 0.99  # as with a memory larger than its base: sampling nearly always needs the memory
PROMPT = 512
COUNT = 64
ROUNDS = 5
_THEIRS = "base alone in transformers"


def rows(
    config: ml_collections.ConfigDict,
    base: gpt2.GPT2Config = BASE,
    memory_model: memory.MemoryConfig = MEMORY,
    prompt: int = PROMPT,
    count: int = COUNT,
) -> list[dict]:
    """Rows of (name, value, unit, detail). Sizes do not depend on the config. Needs 3 GB of memory."""
    del config
    dtype = weights_dtype("bfloat16")
    initialize = jax.jit(
        lambda key: prepare(
            Parameters(gpt2.init(base, key), memory.init(memory_model, jax.random.fold_in(key, 1)), WEIGHT), dtype
        )
    )
    both = initialize(jax.random.key(0))
    alone = Parameters(both.base)
    with_memory = DecoderConfig(base, memory_model, base.blocks)
    plain = Sampling(temperature=1.0)
    cases = {
        "base alone": (DecoderConfig(base), alone, GREEDY),
        "base and memory, greedy": (with_memory, both, GREEDY),
        "base and memory, drawn at temperature 1": (with_memory, both, plain),
        f"base and memory, drawn at lambda {HIGH_WEIGHT}": (with_memory, both._replace(weight=HIGH_WEIGHT), plain),
    }
    first, following = {}, {}
    for name, (models, parameters, sampling) in cases.items():
        first[name], following[name] = _programs(models, parameters, sampling, prompt, count)
    for name in [name for name in cases if "drawn" in name]:  # they share the prefill of greedy decoding
        del first[name]
    try:
        first[_THEIRS], following[_THEIRS] = _their_programs(base, prompt, count)
    except UserError as error:
        say(f"generate: rows of transformers are left out: {error}")
    weights = {"base": language_model.parameter_count(base), "memory": flops.memory_parameters(memory_model)}
    result = [
        row("weights of the memory over those of the base", weights["memory"] / weights["base"], "ratio",
             "1 + this bounds the ratio of a greedy step that is limited by reading weights"),
        row("weights read by one matrix-vector product", _read_rate(both) / 1e9, "GB/s",
             f"[{memory_model.width}] x [{memory_model.width}, {memory_model.padded_vocab_size}]"),
    ]  # fmt: skip
    first_seconds, next_seconds = seconds_by_round(first, ROUNDS), seconds_by_round(following, ROUNDS)
    if _THEIRS in following:
        next_seconds[_THEIRS] = next_seconds[_THEIRS] - np.median(first_seconds[_THEIRS])  # their call includes both
    next_seconds = {name: seconds / (count - 1) for name, seconds in next_seconds.items()}
    traffic = jnp.dtype(dtype).itemsize * weights["base"] / np.median(next_seconds["base alone"])
    result.append(row("weights read by a step, base alone", traffic / 1e9, "GB/s", "bytes of weights divided by time"))
    result += _time_rows("first token", first_seconds, f"prompt of {prompt} tokens, batch 1, {dtype}")
    result += _time_rows("next token", next_seconds, f"mean of {count - 1} after {prompt}, batch 1, {dtype}")
    return result


def _time_rows(title: str, seconds: dict[str, np.ndarray], detail: str) -> list[dict]:
    """Rows of times and of ratios to the base alone: medians over the rounds."""
    result = [row(f"{title}, {name}", 1e3 * np.median(values), "ms", detail) for name, values in seconds.items()]
    alone = seconds["base alone"]
    for name, values in seconds.items():
        if values is not alone:
            weight = HIGH_WEIGHT if str(HIGH_WEIGHT) in name else WEIGHT
            over = f"lambda {weight}, batch 1; the base alone takes {1e3 * np.median(alone):.1f} ms"
            result.append(row(f"{title}, {name} / base alone", np.median(values / alone), "ratio", over))
    return result


def _programs(
    models: DecoderConfig, parameters: Parameters, sampling: Sampling, prompt: int, count: int
) -> tuple[Callable, Callable]:
    """Calls that generate the first token and the following ones."""
    tokens_1xT = np.random.default_rng(0).integers(0, models.base.vocab_size, (1, prompt), dtype=np.int32)
    key, padding = jax.random.key(0), jnp.zeros(1, jnp.int32)
    first = functools.partial(
        first_tokens, models, parameters, tokens_1xT, padding, key, room=prompt + count, sampling=sampling
    )
    tokens_1, cache = first()
    following = functools.partial(
        following_tokens, models, parameters, cache, tokens_1, key, -1, count=count, sampling=sampling
    )
    return first, following


def _their_programs(base: gpt2.GPT2Config, prompt: int, count: int) -> tuple[Callable, Callable]:
    """Calls of transformers that generate the first token, and all tokens, on this machine's CPU.

    Raises:
      UserError: PyTorch or transformers is not installed, or JAX runs on another device.
    """
    torch, transformers = (require(name, extra="torch") for name in ("torch", "transformers"))
    if jax.default_backend() != "cpu":
        raise UserError(f"this row needs a CPU, but JAX runs on {jax.default_backend()}")
    torch.set_num_threads(host.cpu_count())
    sizes = {"n_positions": base.context_length, "n_embd": base.width, "n_layer": base.blocks, "n_head": base.heads}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=base.vocab_size, **sizes, **ends)).eval()
    tokens_1xT = torch.from_numpy(np.random.default_rng(0).integers(0, base.vocab_size, (1, prompt)))
    added = functools.partial(
        torch.inference_mode()(model.generate), tokens_1xT, attention_mask=torch.ones_like(tokens_1xT), do_sample=False
    )
    first, following = (functools.partial(added, max_new_tokens=number) for number in (1, count))
    if following().shape[1] != prompt + count:
        raise UserError("transformers' generate did not add the requested number of tokens")
    return first, following


def _read_rate(parameters: Parameters) -> float:
    """Bytes per second of the largest matrix-vector product of a step."""
    kernel_DxV = memory.output_kernel(parameters.memory)
    product = jax.jit(lambda x_1xD, kernel_DxV: x_1xD @ kernel_DxV)
    call = functools.partial(product, jnp.ones((1, kernel_DxV.shape[0])), kernel_DxV)
    return kernel_DxV.nbytes / np.median(seconds_by_round({"product": call}, ROUNDS)["product"])
