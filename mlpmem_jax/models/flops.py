"""Floating-point operations and parameter counts from a memory's dimensions; `language_model` has those of the base.

A matrix product [m, k] x [k, n] counts 2 m n k; norms, activations and embedding lookups are not counted. Without the
output projection these are the paper's formulas of FLOPs per token ("MLP Memory", arXiv 2508.01832). A backward pass
costs twice its forward pass.
"""

from __future__ import annotations

from mlpmem_jax.models.memory import MemoryConfig


def memory_forward(config: MemoryConfig, *, output_projection: bool = True) -> int:
    """FLOPs per position of a forward pass; the output projection has the padded vocabulary."""
    matrices = 2 if config.family == "gpt2" else 3
    feed_forward = 2 * matrices * config.blocks * config.width * config.feed_forward_width
    transform = 2 * config.input_width * config.width if config.input_width != config.width else 0
    return feed_forward + transform + output_projection * 2 * config.width * config.padded_vocab_size


def memory_parameters(config: MemoryConfig, *, output_projection: bool = True) -> int:
    """Number of parameters; the output projection has the padded vocabulary."""
    width, feed_forward = config.width, config.feed_forward_width
    if config.family == "gpt2":
        blocks = config.blocks * (2 * width * feed_forward + feed_forward + 3 * width) + 2 * width
    else:
        blocks = config.blocks * (3 * width * feed_forward + width) + width
    transform = (config.input_width + 1) * width if config.input_width != width else 0
    return blocks + transform + output_projection * width * config.padded_vocab_size
