"""The datastore's forward pass compared with that of transformers on the same machine, with random float32 weights.

GPT-2 small and a Llama of SmolLM2-135M's dimensions, 2,048 positions in sequences of three lengths. transformers
(extra `torch`) runs with sdpa attention and without an output projection, which the training split does not need
either, on as many threads as JAX has cores. Calls alternate, so that other load affects both equally.
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
from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.core.progress import say
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.models import language_model
from mlpmem_jax.models.gpt2 import GPT2Config
from mlpmem_jax.models.llama import LlamaConfig
from mlpmem_jax.models.rotary import Rotary
from mlpmem_jax.retrieval import datastore

MODELS = {
    "GPT-2 small": GPT2Config(vocab_size=50_257, context_length=2048, width=768, blocks=12, heads=12),
    "SmolLM2-135M": LlamaConfig(
        vocab_size=49_152,
        context_length=2048,
        width=576,
        blocks=30,
        heads=9,
        key_value_heads=3,
        head_width=64,
        feed_forward_width=1536,
        norm_epsilon=1e-5,
        tied=True,
        rotary=Rotary(theta=100_000.0),
    ),
}
POSITIONS, LENGTHS = 2048, (128, 512, 2048)
ROUNDS = 5


def rows(config: ml_collections.ConfigDict) -> list[dict]:
    """Rows of (name, value, unit, detail). Rows with PyTorch need the extra `torch`."""
    del config
    try:
        torch, transformers = (require(name, extra="torch") for name in ("torch", "transformers"))
        torch.set_grad_enabled(False)
        torch.set_num_threads(host.cpu_count())
    except UserError as error:
        say(f"forward: rows of PyTorch are left out: {error}")
        torch = transformers = None
    best, measured = _product_rows(torch)
    for name, model in MODELS.items():
        parameters = language_model.init(model, jax.random.key(0))
        theirs = causal_model(transformers, model).base_model if torch else None
        for length in LENGTHS:
            tokens_BxT = np.random.default_rng(0).integers(0, model.vocab_size, (POSITIONS // length, length))
            calls = {"JAX": _our_pass(model, parameters, tokens_BxT)}
            if theirs is not None:
                calls["PyTorch"] = _their_pass(torch, theirs, tokens_BxT)
            seconds = seconds_by_round(calls, ROUNDS)
            of_position = language_model.forward_flops(model, length, output_projection=False)
            for library, seconds_R in seconds.items():
                rate = POSITIONS / float(np.median(seconds_R))
                detail = f"{rate * of_position / best:.2f} of the best product's rate; median of {ROUNDS}"
                if library == "JAX" and "PyTorch" in seconds:
                    ratio = float(np.median(seconds["PyTorch"] / seconds_R))
                    detail += f"; {ratio:.2f} times PyTorch's rate, median of the rounds' ratios"
                title = f"forward, {name}, {POSITIONS // length} x {length}, {library}"
                measured.append(row(title, rate, "positions/s", detail))
    return measured


def _product_rows(torch) -> tuple[float, list[dict]]:
    """The highest FLOP/s of any library for a feed-forward layer's matrix product, and a row for each library."""
    random = np.random.default_rng(0)
    left_NxD, right_DxO = (random.standard_normal(shape, np.float32) for shape in ((POSITIONS, 768), (768, 3072)))
    calls = {
        "JAX": functools.partial(jax.jit(jnp.dot), jnp.asarray(left_NxD), jnp.asarray(right_DxO)),
        "NumPy": functools.partial(np.dot, left_NxD, right_DxO),
    }
    if torch:
        calls["PyTorch"] = functools.partial(torch.matmul, torch.from_numpy(left_NxD), torch.from_numpy(right_DxO))
    operations = 2.0 * left_NxD.size * right_DxO.shape[1]
    rates = {name: operations / float(np.min(seconds_R)) for name, seconds_R in seconds_by_round(calls, ROUNDS).items()}
    detail = f"[{POSITIONS}, 768] x [768, 3072], float32, {host.cpu_count()} threads, best of {ROUNDS}"
    return max(rates.values()), [
        row(f"forward, a product in {name}", rate / 1e9, "GFLOP/s", detail) for name, rate in rates.items()
    ]


def _our_pass(model: language_model.Config, parameters: dict, tokens_BxT: np.ndarray) -> Callable[[], object]:
    """The program that stage `datastore` runs for the training split, on one device."""
    tokens_BxT = jnp.asarray(tokens_BxT, jnp.int32)
    return functools.partial(
        datastore.forward,
        parameters,
        tokens_BxT,
        tokens_BxT,
        config=model,
        input_blocks=(model.blocks,),
        dtype=jnp.dtype("float16"),
        compute_dtype=jnp.dtype("float32"),
        sharding=Sharding(make_mesh(devices=jax.devices()[:1])),
        scored=False,
    )


def _their_pass(torch, model, tokens_BxT: np.ndarray) -> Callable[[], object]:
    tokens = torch.from_numpy(tokens_BxT)
    return lambda: model(tokens, use_cache=False).last_hidden_state.half()


def causal_model(transformers, model: language_model.Config):
    """A language model of transformers with these dimensions and random weights."""
    config = transformers.AutoConfig.for_model(**language_model.to_json(model))
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
