"""Reads and writes config.json of Hugging Face models; the module of each family in models/ interprets its keys."""

from __future__ import annotations

import json
import pathlib

from etils import epath

from mlpmem_jax.core.errors import UserError
from mlpmem_jax.models import language_model
from mlpmem_jax.models.config_json import ConfigJson


def read_config(folder: pathlib.Path | epath.Path, part: str = "") -> language_model.Config:
    """Dimensions of the language model in the folder's config.json, under `<part>_config` if it is a part.

    Raises:
      UserError: the file is missing or unreadable, or describes a model that this package does not implement.
    """
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        values = dict(values.get(f"{part}_config") if part else values)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{file}: expected the config of a Hugging Face model: {error}") from error
    if quantized := values.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise UserError(
            f"{file}: the weights are quantized (quantization_config, quant_method {method!r}); expected "
            "floating-point weights: use the model that was quantized, or a GGUF file"
        )
    return language_model.from_json(ConfigJson(str(file), values))


def to_json(config: language_model.Config) -> dict:
    """The config.json of a language model. Token ids of begin and end are null, because the tokenizer defines them."""
    return {**language_model.to_json(config), "bos_token_id": None, "eos_token_id": None}
