"""Time per next token with a workdir's trained models: the more drafts are right, the more drafting saves."""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from mlpmem_jax.core.artifacts import open_artifact
from mlpmem_jax.core.benchmark_rows import row
from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.core.progress import say
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.corpus.tokens import TokenStream, num_sequences, read_sequences
from mlpmem_jax.inference import drafting
from mlpmem_jax.inference.decoding import DecoderConfig, Parameters, prepare, weights_dtype
from mlpmem_jax.inference.generate import first_tokens, following_tokens
from mlpmem_jax.inference.sampling import GREEDY
from mlpmem_jax.inference.weight import find_weight
from mlpmem_jax.models import saved

_PROMPTS = 8  # beginnings of sequences of the test split
_COUNT = 64


def rows(config: ml_collections.ConfigDict) -> list[dict]:
    """Rows of (name, value, unit, detail); none for a workdir without a memory."""
    workdir = epath.Path(config.workdir)
    if not (workdir / "memory").exists():
        say(f"generate: no rows of trained models, {workdir / 'memory'} does not exist")
        return []
    sharding = Sharding(make_mesh(devices=jax.devices()[:1]))
    tokens = open_artifact(workdir / "tokens", "tokens")
    base, base_config, _ = saved.load_language_model(workdir / "base", sharding)
    memory_parameters, memory_config, artifact = saved.load_memory(workdir / "memory", sharding)
    weight, block = find_weight(workdir, artifact).value, saved.input_block(artifact)
    both = prepare(Parameters(base, memory_parameters, weight), weights_dtype(config.datastore.compute_dtype))
    del base, memory_parameters
    models, alone = DecoderConfig(base_config, memory_config, block), Parameters(both.base)
    base_alone = DecoderConfig(base_config)
    length = config.base.context_length // 2
    count = min(_COUNT, base_config.context_length - length)
    stream = TokenStream(tokens, "test")
    prompts_SxT = read_sequences(stream, 0, min(_PROMPTS, num_sequences(stream, length)), length)[0].astype(np.int32)
    seconds: dict[str, list[float]] = {"base alone": [], "memory in every step": [], "with drafts": []}
    steps, passes, plain_passes = 0, 0, 0
    for number, prompt_T in enumerate(prompts_SxT):
        first = functools.partial(first_tokens, room=length + count, sampling=GREEDY)
        key, padding = jax.random.key(0), jnp.zeros(1, jnp.int32)
        token_1, cache = first(models, both, prompt_T[None], padding, key)
        alone_token_1, alone_cache = first(base_alone, alone, prompt_T[None], padding, key)
        draft = functools.partial(drafting.greedy_tokens, models, both, cache, token_1, -1, count=count)
        calls = (
            functools.partial(
                following_tokens, base_alone, alone, alone_cache, alone_token_1, key, -1,
                count=count, sampling=GREEDY,
            ),
            functools.partial(draft, most=1),
            functools.partial(draft, most=drafting.MOST_DRAFTS),
        )  # fmt: skip
        if not number:
            jax.block_until_ready([call() for call in calls])
        results = []
        for times, call in zip(seconds.values(), calls, strict=True):
            start = time.perf_counter()
            results.append(jax.block_until_ready(call()))
            times.append((time.perf_counter() - start) / (count - 1))
        _, plain, drafted = results
        plain_passes += int(plain.memory_passes)
        steps, passes = steps + int(drafted.base_steps), passes + int(drafted.memory_passes)
    added = len(prompts_SxT) * (count - 1)
    shared = f"batch 1, {len(prompts_SxT)} prompts of {length} tokens of the test split, {count - 1} new tokens each"
    details = {
        "base alone": shared,
        "memory in every step": f"lambda {weight:.2f}; steps that it could change: {plain_passes} of {added}; {shared}",
        "with drafts": f"lambda {weight:.2f}; for {added} tokens {steps} steps of the base and {passes} passes of the "
        f"memory; {shared}",
    }
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    result = []
    for name, value in medians.items():
        over = f"{value / medians['base alone']:.2f} times the base alone; " if name != "base alone" else ""
        result.append(row(f"next token, trained, {name}", 1e3 * value, "ms", over + details[name]))
    return result
