"""Reads and writes rotary embeddings in a Hugging Face config.json."""

from __future__ import annotations

import math

from mlpmem_jax.models import rotary
from mlpmem_jax.models.config_json import NUMBER, ConfigJson
from mlpmem_jax.models.rotary import Rotary

_FIELDS = {  # key in config.json -> field of Rotary
    "factor": "factor",
    "original_max_position_embeddings": "original_length",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "attention_factor": "attention_factor",
}
_KEYS = {  # keys of each type
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "original_max_position_embeddings", "factor", "beta_fast", "beta_slow", "truncate", "attention_factor"
    ),
}  # fmt: skip


def from_json(source: ConfigJson, positions: int) -> Rotary:
    """Reads `rope_parameters`, or `rope_scaling` and `rope_theta` as in transformers before 5.

    Args:
      source: the whole config.json.
      positions: its max_position_embeddings.

    Raises:
      UserError: a key is missing, or its value is not implemented.
    """
    group = "rope_scaling" if source.values.get("rope_scaling") else "rope_parameters"
    theta = source.optional("rope_theta", 10_000.0, NUMBER)
    values = {"rope_theta": theta, **source.optional(group, {}, (dict,))}
    if nested := [key for key, value in values.items() if isinstance(value, dict)]:
        raise source.error(
            f"{group} has groups for kinds of layers ({', '.join(nested)}); only one for all is supported"
        )
    kind = values.get("rope_type") or values.get("type") or "default"
    source.check_allowed(f"{group}.rope_type", kind, rotary.TYPES)
    partial = values.get("partial_rotary_factor") or source.values.get("partial_rotary_factor")
    source.check_allowed("partial_rotary_factor", partial, (None, 1.0))
    original = values.setdefault("original_max_position_embeddings", positions)
    for key in _FIELDS:
        ConfigJson(source.file, values).optional(key, None, (bool,) if key == "truncate" else NUMBER)
    if kind == "yarn" and isinstance(original, int):
        defaults = {"factor": positions / original, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
        values = {**defaults, **{key: value for key, value in values.items() if value is not None}}
        values.setdefault("attention_factor", _yarn_attention_factor(values))
    for key in ("rope_theta", *_KEYS[kind]):
        if not isinstance(values.get(key), int | float):
            raise source.error(f"{group}.{key} is {values.get(key)!r}; rope_type {kind!r} needs a number there")
    numbers = {_FIELDS[key]: values[key] for key in _KEYS[kind]}
    if kind == "dynamic":
        numbers["original_length"] = positions
    return Rotary(kind, float(values["rope_theta"]), **numbers)


def _yarn_attention_factor(values: dict) -> float:
    """0.1 m ln(factor) + 1 (Peng et al., 2023, equation 22), as a ratio if a model gives two values of m."""

    def scale(m: float) -> float:
        return 0.1 * m * math.log(values["factor"]) + 1.0 if values["factor"] > 1 else 1.0

    if values.get("mscale") and values.get("mscale_all_dim"):
        return scale(values["mscale"]) / scale(values["mscale_all_dim"])
    return scale(1.0)


def to_json(embedding: Rotary) -> dict:
    """The keys for config.json; the last two are for transformers before 5, which would otherwise use its defaults."""
    scaling = {key: getattr(embedding, _FIELDS[key]) for key in _KEYS[embedding.type]}
    return {
        "rope_parameters": {"rope_type": embedding.type, "rope_theta": embedding.theta, **scaling},
        "rope_theta": embedding.theta,
        "rope_scaling": {"rope_type": embedding.type, **scaling} if scaling else None,
    }
