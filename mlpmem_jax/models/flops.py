"""Floating-point operations and parameter counts from a model's dimensions.

A matrix product [m, k] x [k, n] counts 2 m n k; norms, activations and embedding look-ups count nothing. Without
the output projection these are the formulas of FLOPs per token of the paper "MLP Memory" (arXiv 2508.01832). A
backward pass costs twice its forward pass.
"""

from __future__ import annotations

from mlpmem_jax.models.gpt2 import GPT2Config
from mlpmem_jax.models.memory import MemoryConfig


def gpt2_forward(config: GPT2Config, length: int, *, output_projection: bool = True) -> int:
    """FLOPs per position of a forward pass over sequences of `length` positions.

    Attention counts the positions a position may see, length / 2 in the mean, even where more are computed.
    """
    projections = 4 * config.blocks * config.width * (2 * config.width + 4 * config.width)
    attention = 2 * config.blocks * length * config.width
    return projections + attention + output_projection * 2 * config.width * config.vocab_size


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


def memory_parameters(config: MemoryConfig, *, output_projection: bool = True) -> int:
    """Number of parameters; the output projection has the padded vocabulary."""
    width, feed_forward = config.width, config.feed_forward_width
    if config.family == "gpt2":
        blocks = config.blocks * (2 * width * feed_forward + feed_forward + 3 * width) + 2 * width
    else:
        blocks = config.blocks * (3 * width * feed_forward + width) + width
    transform = (config.input_width + 1) * width if config.input_width != width else 0
    return blocks + transform + output_projection * width * config.padded_vocab_size
