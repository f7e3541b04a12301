"""How a family's parameters are named and laid out in Hugging Face checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

Axes = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class CheckpointNames:
    """Names of tensors, and how their axes relate to ours.

    Attributes:
      prefix: what stands before the names of all tensors but the output projection; bare models leave it out.
      blocks: what the list of blocks is called.
      transposed: whether kernels are stored [out, in] (torch.nn.Linear) and not [in, out] (Conv1D).
      joined_axes: of kernels and biases with heads, for every axis of a tensor the axes of ours that it joins.
    """

    prefix: str
    blocks: str
    transposed: bool
    joined_axes: Mapping[str, Axes]
