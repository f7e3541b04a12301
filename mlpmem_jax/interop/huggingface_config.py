"""config.json of Hugging Face models, to and from the dimensions of our language models.

What models/ does not implement is refused by its key: it would load, and give other numbers.
"""

from __future__ import annotations

import json
import math
import pathlib

from etils import epath

from mlpmem_jax.core.errors import UserError
from mlpmem_jax.models import language_model, rotary
from mlpmem_jax.models.gpt2 import GPT2Config
from mlpmem_jax.models.llama import LlamaConfig
from mlpmem_jax.models.rotary import Rotary

# Keys that a config may leave out, and the values that models/ implements; the first one is what leaving out means.
_IMPLEMENTED = {
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    },
    "llama": {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
    "mistral": {"hidden_act": ("silu",)},
}
_GPT2_DIMENSIONS = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
_LLAMA_DIMENSIONS = (
    "vocab_size",
    "max_position_embeddings",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)
_NUMBER = (int, float)
_ROTARY_NUMBERS = {  # their names there -> ours
    "factor": "factor",
    "original_max_position_embeddings": "original_length",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "attention_factor": "attention_factor",
}
_ROTARY_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "original_max_position_embeddings", "factor", "beta_fast", "beta_slow", "truncate", "attention_factor"
    ),
}  # fmt: skip


def read_config(folder: pathlib.Path | epath.Path, part: str = "") -> language_model.Config:
    """Dimensions of the language model that the folder's config.json describes, under `<part>_config` if it is a part.

    Raises:
      UserError: the file is missing, unreadable, or describes what this package does not implement.
    """
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        values = values.get(f"{part}_config") if part else values
        family = values.get("model_type", "gpt2")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: expected the config of a Hugging Face model: {error}") from error
    _check_allowed(file, "model_type", family, tuple(_IMPLEMENTED))
    for key, allowed in _IMPLEMENTED[family].items():
        _check_allowed(file, key, values.get(key, allowed[0]), allowed)
    return _gpt2(file, values) if family == "gpt2" else _llama(file, family, values)


def _check_allowed(file: pathlib.Path, key: str, value, allowed: tuple) -> None:
    if value not in allowed:
        raise UserError(f"{file}: {key} is {value!r}; only {' or '.join(map(repr, allowed))} can be imported")


def _dimensions(file: pathlib.Path, values: dict, keys: tuple[str, ...], family: str) -> list[int]:
    for key in keys:
        if type(values.get(key)) is not int or values[key] < 1:
            raise UserError(
                f"{file}: {key} is missing or no whole number above 0; this is no config of a {family} model"
            )
    return [values[key] for key in keys]


def _optional(file: pathlib.Path, values: dict, key: str, default, kinds: tuple[type, ...] = (int,)):
    """The positive number, or text or switch, under a key that may be left out; null counts as `default`."""
    value = values.get(key)
    if value is None:
        return default
    is_number = type(value) is not bool and isinstance(value, int | float)
    if type(value) not in kinds or (is_number and not 0 < value < math.inf):
        expected = {int: "a whole number above 0", float: "a number above 0", bool: "true or false", dict: "a group"}
        raise UserError(f"{file}: {key} is {value!r}; expected {expected[kinds[-1]]}, or null")
    return value


def _check_divides(file: pathlib.Path, values: dict, part: str, whole: str) -> None:
    if values[whole] % values[part]:
        raise UserError(f"{file}: {part}, {values[part]}, does not divide {whole}, {values[whole]}")


def _gpt2(file: pathlib.Path, values: dict) -> GPT2Config:
    vocab_size, context_length, width, blocks, heads = _dimensions(file, values, _GPT2_DIMENSIONS, "gpt2")
    _check_divides(file, values, "n_head", "n_embd")
    if _optional(file, values, "n_inner", 4 * width) != 4 * width:
        raise UserError(f"{file}: n_inner is {values['n_inner']}; only 4 x n_embd can be imported")
    epsilon = _optional(file, values, "layer_norm_epsilon", 1e-5, _NUMBER)
    return GPT2Config(vocab_size, context_length, width, blocks, heads, epsilon)


def _llama(file: pathlib.Path, family: str, values: dict) -> LlamaConfig:
    dimensions = _dimensions(file, values, _LLAMA_DIMENSIONS, family)
    vocab_size, positions, width, blocks, heads, feed_forward_width = dimensions
    if values.get("head_dim") is None:
        _check_divides(file, values, "num_attention_heads", "hidden_size")
    head_width = _optional(file, values, "head_dim", width // heads)
    if head_width % 2:
        raise UserError(f"{file}: head_dim is {head_width}; rotary embeddings need an even one")
    left_out = heads if family == "llama" or "num_key_value_heads" in values else 8
    key_value_heads = _optional(file, values, "num_key_value_heads", left_out)
    values = {**values, "num_key_value_heads": key_value_heads}
    _check_divides(file, values, "num_key_value_heads", "num_attention_heads")
    window = 0 if "sliding_window" in values else 4096
    turned = _rotary(file, values, positions)
    # The frequencies of this type depend on the length, to extend beyond the positions of the config.
    stretch = turned.factor if turned.type == "dynamic" else 1
    return LlamaConfig(
        vocab_size=vocab_size,
        context_length=int(stretch * positions),
        width=width,
        blocks=blocks,
        heads=heads,
        key_value_heads=key_value_heads,
        head_width=head_width,
        feed_forward_width=feed_forward_width,
        norm_epsilon=_optional(file, values, "rms_norm_eps", 1e-6, _NUMBER),
        sliding_window=_optional(file, values, "sliding_window", window) if family == "mistral" else 0,
        tied=_optional(file, values, "tie_word_embeddings", False, (bool,)),
        rotary=turned,
        family=family,
    )


def _rotary(file: pathlib.Path, values: dict, positions: int) -> Rotary:
    """From `rope_parameters`, or `rope_scaling` and `rope_theta` of transformers before 5."""
    group = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    theta = _optional(file, values, "rope_theta", 10_000.0, _NUMBER)
    given = {"rope_theta": theta, **_optional(file, values, group, {}, (dict,))}
    kind = given.get("rope_type") or given.get("type") or "default"
    _check_allowed(file, f"{group}.rope_type", kind, rotary.TYPES)
    partial = given.get("partial_rotary_factor") or values.get("partial_rotary_factor")
    _check_allowed(file, "partial_rotary_factor", partial, (None, 1.0))
    original = given.setdefault("original_max_position_embeddings", positions)
    for key in _ROTARY_NUMBERS:
        _optional(file, given, key, None, (bool,) if key == "truncate" else _NUMBER)
    if kind == "yarn" and isinstance(original, int):
        defaults = {"factor": positions / original, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
        given = {**defaults, **{key: value for key, value in given.items() if value is not None}}
        given.setdefault("attention_factor", _yarn_attention_factor(given))
    for key in ("rope_theta", *_ROTARY_KEYS[kind]):
        if not isinstance(given.get(key), int | float):
            raise UserError(f"{file}: {group}.{key} is {given.get(key)!r}; rope_type {kind!r} needs a number there")
    numbers = {_ROTARY_NUMBERS[key]: given[key] for key in _ROTARY_KEYS[kind]}
    if kind == "dynamic":
        numbers["original_length"] = positions
    return Rotary(kind, float(given["rope_theta"]), **numbers)


def _yarn_attention_factor(given: dict) -> float:
    """0.1 m ln(factor) + 1 (Peng et al., 2023, equation 22), as a ratio where a model gives two values of m."""

    def scale(m: float) -> float:
        return 0.1 * m * math.log(given["factor"]) + 1.0 if given["factor"] > 1 else 1.0

    if given.get("mscale") and given.get("mscale_all_dim"):
        return scale(given["mscale"]) / scale(given["mscale_all_dim"])
    return scale(1.0)


def to_json(config: language_model.Config) -> dict:
    """What config.json says of a language model. Token ids of begin and end are null: a tokenizer has them."""
    no_tokens = {"bos_token_id": None, "eos_token_id": None}
    if isinstance(config, GPT2Config):
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": config.vocab_size,
            "n_positions": config.context_length,
            "n_embd": config.width,
            "n_layer": config.blocks,
            "n_head": config.heads,
            "activation_function": config.activation,
            "layer_norm_epsilon": config.norm_epsilon,
            "tie_word_embeddings": True,
            **no_tokens,
        }
    turned = config.rotary
    scaling = {key: getattr(turned, _ROTARY_NUMBERS[key]) for key in _ROTARY_KEYS[turned.type]}
    values = {
        "architectures": [f"{config.family.capitalize()}ForCausalLM"],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": turned.original_length if turned.type == "dynamic" else config.context_length,
        "hidden_size": config.width,
        "num_hidden_layers": config.blocks,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.feed_forward_width,
        "hidden_act": config.activation,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "rope_parameters": {"rope_type": turned.type, "rope_theta": turned.theta, **scaling},
        # transformers before 5 reads these two, and would take its defaults without them.
        "rope_theta": turned.theta,
        "rope_scaling": {"rope_type": turned.type, **scaling} if scaling else None,
        **no_tokens,
    }
    if config.family == "mistral":
        values["sliding_window"] = config.sliding_window or None
    return values
