"""`mlpmem export --verify`: checks that the exported folder scores the test split in PyTorch like the evaluation."""

from __future__ import annotations

import json
import math
import pathlib

import ml_collections
import numpy as np
from etils import epath

from mlpmem_jax.core.artifacts import open_artifact
from mlpmem_jax.core.errors import UserError, require
from mlpmem_jax.core.progress import progress, say
from mlpmem_jax.corpus.tokens import TokenStream, num_sequences, read_sequences

RELATIVE_TOLERANCE = 1e-4
_LOGITS_AT_ONCE = 2**25


def perplexities(model, tokens_SxT: np.ndarray, next_SxT: np.ndarray) -> dict[str, float]:
    """Perplexity of base, memory and their mixture, computed in PyTorch.

    Args:
      model: an exported model, loaded by transformers; its interpolation weight is restored.
      tokens_SxT: sequences, int.
      next_SxT: the token after each, int.
    """
    torch, tuned = require("torch", extra="torch"), model.config.interpolation_weight
    weights = {"base": 0.0, "memory": 1.0, "augmented": tuned}
    length = tokens_SxT.shape[1]
    batch = max(1, _LOGITS_AT_ONCE // (length * model.config.base_config.vocab_size))
    result = {}
    with torch.inference_mode(), progress(len(weights) * tokens_SxT.size, "verify: PyTorch", "positions") as bar:
        for name, weight in weights.items():
            model.config.interpolation_weight = weight
            total = 0.0
            for first in range(0, len(tokens_SxT), batch):
                rows = slice(first, first + batch)
                following = torch.from_numpy(next_SxT[rows].astype(np.int64))
                logits = model(torch.from_numpy(tokens_SxT[rows].astype(np.int64)), use_cache=False).logits
                total += float(logits.gather(-1, following[..., None]).double().sum())
                bar.advance(following.numel())
            result[name] = math.exp(-total / tokens_SxT.size)
    model.config.interpolation_weight = tuned
    return result


def load(folder: pathlib.Path, dtype: str = "float32"):
    """The model of a folder that `export_model.transformers_folder` wrote, with weights of a floating-point dtype."""
    torch, transformers = require("torch", extra="torch"), require("transformers", extra="torch")
    options = {"trust_remote_code": True, "dtype": getattr(torch, dtype)}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def test_sequences(config: ml_collections.ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and next tokens [S, T] of the test split of `config.workdir`."""
    stream = TokenStream(open_artifact(epath.Path(config.workdir) / "tokens", "tokens"), "test")
    length = config.base.context_length
    return read_sequences(stream, 0, num_sequences(stream, length), length)[:2]


def run(config: ml_collections.ConfigDict, folder: pathlib.Path) -> dict[str, float]:
    """Perplexities on the test split of `config.workdir`, compared with its report/metrics.json.

    Raises:
      UserError: there is no report, or a perplexity differs from it by more than a relative 1e-4.
    """
    file = epath.Path(config.workdir) / "report" / "metrics.json"
    if not file.exists():
        raise UserError(f"--verify: {file} does not exist; run `mlpmem evaluate` first")
    expected = json.loads(file.read_text())["perplexity"]["test"]
    measured = perplexities(load(folder), *test_sequences(config))
    differences = {name: measured[name] / expected[name] - 1 for name in measured}
    for name, value in measured.items():
        say(
            f"verify: test perplexity of {name}: {value:.6f} in PyTorch, {expected[name]:.6f} in metrics.json, "
            f"difference {differences[name]:+.1e}"
        )
    name = max(differences, key=lambda name: abs(differences[name]))
    if abs(differences[name]) > RELATIVE_TOLERANCE:
        raise UserError(
            f"--verify: test perplexity of {name} is {measured[name]:.6f} in PyTorch and {expected[name]:.6f} in "
            f"{file}; allowed is a relative difference of {RELATIVE_TOLERANCE:g}"
        )
    return measured
