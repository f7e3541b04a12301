"""Floating-point operations and parameter counts from a model's dimensions.

A matrix product [m, k] x [k, n] counts 2 m n k; norms, activations and embedding look-ups count nothing. Without
the output projection these are the formulas of FLOPs per token of the paper "MLP Memory" (arXiv 2508.01832). A
backward pass costs twice its forward pass.
"""

from __future__ import annotations

from mlpmem_jax.models import language_model
from mlpmem_jax.models.gpt2 import GPT2Config
from mlpmem_jax.models.llama import LlamaConfig
from mlpmem_jax.models.memory import MemoryConfig


def language_model_forward(config: language_model.Config, length: int, *, output_projection: bool = True) -> int:
    """FLOPs per position of a forward pass of any family over sequences of `length` positions; see `gpt2_forward`."""
    forward = gpt2_forward if isinstance(config, GPT2Config) else llama_forward
    return forward(config, length, output_projection=output_projection)


def language_model_parameters(config: language_model.Config, *, embeddings: bool = True) -> int:
    """Number of parameters of any family; without `embeddings`, those of the blocks and the final norm."""
    parameters = gpt2_parameters if isinstance(config, GPT2Config) else llama_parameters
    return parameters(config, embeddings=embeddings)


def gpt2_forward(config: GPT2Config, length: int, *, output_projection: bool = True) -> int:
    """FLOPs per position of a forward pass over sequences of `length` positions.

    Attention counts the positions a position may see, length / 2 in the mean, even where more are computed.
    """
    projections = 4 * config.blocks * config.width * (2 * config.width + 4 * config.width)
    attention = 2 * config.blocks * length * config.width
    return projections + attention + output_projection * 2 * config.width * config.vocab_size


def llama_forward(config: LlamaConfig, length: int, *, output_projection: bool = True) -> int:
    """FLOPs per position of a forward pass over sequences of `length` positions; attention as for `gpt2_forward`."""
    attention_width = config.heads * config.head_width
    key_value_width = config.key_value_heads * config.head_width
    projections = 4 * config.blocks * config.width * (attention_width + key_value_width)
    feed_forward = 6 * config.blocks * config.width * config.feed_forward_width
    window = min(config.sliding_window or length, length)
    attention = 2 * config.blocks * attention_width * (2 * length - window) * window // length
    return projections + feed_forward + attention + output_projection * 2 * config.width * config.vocab_size


def memory_forward(config: MemoryConfig, *, output_projection: bool = True) -> int:
    """FLOPs per position of a forward pass; the output projection has the padded vocabulary."""
    matrices = 2 if config.family == "gpt2" else 3
    feed_forward = 2 * matrices * config.blocks * config.width * config.feed_forward_width
    transform = 2 * config.input_width * config.width if config.input_width != config.width else 0
    return feed_forward + transform + output_projection * 2 * config.width * config.padded_vocab_size


def gpt2_parameters(config: GPT2Config, *, embeddings: bool = True) -> int:
    """Number of parameters; without `embeddings`, those of the blocks and the final norm."""
    width = config.width
    blocks = config.blocks * (12 * width**2 + 13 * width) + 2 * width
    return blocks + embeddings * (config.vocab_size + config.context_length) * width


def llama_parameters(config: LlamaConfig, *, embeddings: bool = True) -> int:
    """Number of parameters; without `embeddings`, those of the blocks and the final norm."""
    attention = 2 * config.width * config.head_width * (config.heads + config.key_value_heads)
    block = attention + 3 * config.width * config.feed_forward_width + 2 * config.width
    tables = 1 if config.tied else 2
    return config.blocks * block + config.width + embeddings * tables * config.vocab_size * config.width


def memory_parameters(config: MemoryConfig, *, output_projection: bool = True) -> int:
    """Number of parameters; the output projection has the padded vocabulary."""
    width, feed_forward = config.width, config.feed_forward_width
    if config.family == "gpt2":
        blocks = config.blocks * (2 * width * feed_forward + feed_forward + 3 * width) + 2 * width
    else:
        blocks = config.blocks * (3 * width * feed_forward + width) + width
    transform = (config.input_width + 1) * width if config.input_width != width else 0
    return blocks + transform + output_projection * width * config.padded_vocab_size
