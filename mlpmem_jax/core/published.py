"""Dimensions of published language models by Hugging Face name, so that planning and launching need no network.

Source: config.json of the model on huggingface.co. Imports no accelerator runtime.
"""

from __future__ import annotations


def _gpt2(width: int, blocks: int, heads: int) -> dict:
    return {"vocab_size": 50257, "context_length": 1024, "width": width, "blocks": blocks, "heads": heads}


def _llama(family: str, vocab_size: int, context_length: int, key_value_heads: int, feed_forward_width: int) -> dict:
    return {
        "vocab_size": vocab_size,
        "context_length": context_length,
        "width": 4096,
        "blocks": 32,
        "heads": 32,
        "key_value_heads": key_value_heads,
        "head_width": 128,
        "feed_forward_width": feed_forward_width,
        "norm_epsilon": 1e-5,
        "rotary": {},
        "family": family,
    }


DIMENSIONS: dict[str, dict] = {
    "openai-community/gpt2": _gpt2(768, 12, 12),
    "openai-community/gpt2-medium": _gpt2(1024, 24, 16),
    "openai-community/gpt2-large": _gpt2(1280, 36, 20),
    "openai-community/gpt2-xl": _gpt2(1600, 48, 25),
    "meta-llama/Llama-2-7b-hf": _llama("llama", 32000, 4096, 32, 11008),
    "mistralai/Mistral-7B-v0.3": _llama("mistral", 32768, 32768, 8, 14336),
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        **_llama("llama", 49152, 8192, 3, 1536),
        **{"width": 576, "blocks": 30, "heads": 9, "head_width": 64, "rotary": {"theta": 100_000.0}, "tied": True},
    },
}
"""Fields by Hugging Face name, as `models.language_model.from_fields` takes them."""


def find(source: str) -> dict | None:
    """The fields of NAME or NAME@REVISION; None if unknown."""
    return DIMENSIONS.get(source.partition("@")[0])
