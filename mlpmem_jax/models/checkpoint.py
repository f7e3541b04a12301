"""How a family's parameters are named and laid out in Hugging Face checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

Axes = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class CheckpointNames:
    """Names of tensors, and how their axes relate to ours.

    Attributes:
      prefix: prefix of all tensor names except the output projection's; bare models omit it.
      blocks: name of the list of blocks.
      transposed: whether kernels are stored as [out, in] (torch.nn.Linear) rather than [in, out] (Conv1D).
      joined_axes: for kernels and biases with heads, which of our axes each axis of a tensor joins.
    """

    prefix: str
    blocks: str
    transposed: bool
    joined_axes: Mapping[str, Axes]
