"""What fewer bits per weight cost and save: a workdir's models, exported to PyTorch, in float32, bfloat16 and int8.

int8 is torchao's weight-only quantization, one scale per output channel, of all `torch.nn.Linear` layers: of Llama and
Mistral those are all matrices but the embedding, of GPT-2 only the output projections. Needs the extras `torch` and
`bench`.
"""

from __future__ import annotations

import pathlib
import tempfile
import time
from collections.abc import Iterator

import ml_collections
import numpy as np
from etils import epath

from mlpmem_jax.core import host
from mlpmem_jax.core.benchmark_rows import row
from mlpmem_jax.core.errors import UserError, require
from mlpmem_jax.core.progress import say
from mlpmem_jax.interop import export_model, verification

_COUNT, _ROUNDS = 64, 3


def rows(config: ml_collections.ConfigDict) -> Iterator[dict]:
    """Rows of (name, value, unit, detail); none for a workdir without a memory."""
    workdir = epath.Path(config.workdir)
    if not (workdir / "memory").exists():
        say(f"weights: no rows, {workdir / 'memory'} does not exist")
        return
    torch = require("torch", extra="torch")
    torch.set_num_threads(host.cpu_count())
    tokens_SxT, next_SxT = verification.test_sequences(config)
    prompt_1xT = torch.from_numpy(tokens_SxT[:1, : tokens_SxT.shape[1] // 2].astype(np.int64))
    with tempfile.TemporaryDirectory() as parent:
        folder = export_model.transformers_folder(config, str(pathlib.Path(parent) / "exported"))
        for kind in ("float32", "bfloat16", "int8"):
            try:
                model = _with_weights(folder, kind)
            except UserError as error:
                say(f"weights: no row of {kind}: {error}")
                continue
            perplexity = verification.perplexities(model, tokens_SxT, next_SxT)
            weight, seconds = model.config.interpolation_weight, {}
            for name, used in (("base alone", 0.0), ("with memory", weight)):
                model.config.interpolation_weight = used
                seconds[name] = _seconds_per_token(model, prompt_1xT)
            both, alone = (1e3 * seconds[name] for name in ("with memory", "base alone"))
            size = sum(_bytes(parameter) for parameter in model.parameters())
            yield row(
                f"exported to PyTorch, weights in {kind}",
                perplexity["augmented"],
                "test perplexity",
                f"base alone {perplexity['base']:.3f}, lambda {weight:.2f}; {size / 1e6:,.0f} MB of weights; next "
                f"token, batch 1: {both:.1f} ms, base alone {alone:.1f} ms",
            )
            del model


def _with_weights(folder: pathlib.Path, kind: str):
    """The model of a folder with weights in float32, bfloat16, or int8 (and what is not quantized in bfloat16).

    Raises:
      UserError: torchao is not installed.
    """
    if kind != "int8":
        return verification.load(folder, kind)
    quantization = require("torchao.quantization", extra="bench")
    model = verification.load(folder, "bfloat16")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def _bytes(tensor) -> int:
    """Bytes of a tensor, or of the tensors that a quantized one consists of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


def _seconds_per_token(model, prompt_1xT) -> float:
    """Median time per token after the first of a greedy continuation."""
    torch = require("torch", extra="torch")

    def generate(count: int) -> float:
        start = time.perf_counter()
        tokens = model.generate(
            prompt_1xT, attention_mask=torch.ones_like(prompt_1xT), do_sample=False,
            max_new_tokens=count, min_new_tokens=count,
        )  # fmt: skip
        if tokens.shape[1] != prompt_1xT.shape[1] + count:
            raise UserError("weights: transformers' generate did not add the requested number of tokens")
        return time.perf_counter() - start

    generate(2)
    return float(np.median([generate(_COUNT) - generate(1) for _ in range(_ROUNDS)])) / (_COUNT - 1)
