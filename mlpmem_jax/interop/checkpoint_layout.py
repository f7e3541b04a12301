"""Maps our parameters to Hugging Face checkpoints: names of tensors, and how their axes relate to ours.

Ours have stacked blocks, separate axes for heads, and kernels [in, out]. Checkpoints have one tensor per block, heads
joined with their width, and kernels [in, out] (GPT-2's Conv1D) or [out, in] (Linear in other families).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np

from mlpmem_jax.models import language_model
from mlpmem_jax.models.checkpoint import Axes


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one of our arrays is stored.

    Attributes:
      names: names of its tensors without prefix: one per block, or a single one.
      stacked: whether our array has a leading axis of blocks.
      shape: shape of our array, or of one block of it.
      axes: for every axis of a tensor, the axes of `shape` that it joins, in order.
    """

    names: tuple[str, ...]
    stacked: bool
    shape: tuple[int, ...]
    axes: Axes

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.shape[axis] for axis in joined) for joined in self.axes)

    @property
    def _order(self) -> list[int]:
        return [axis for joined in self.axes for axis in joined]

    def from_tensor(self, index: tuple[slice, ...], read: Callable[[tuple[slice, ...]], np.ndarray]) -> np.ndarray:
        """Part `index` of our array (for one block), from a function that reads a part of its tensor."""
        bounds = [part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True)]
        # Of joined axes, only the first restricts what is read.
        inner = [math.prod(self.shape[axis] for axis in joined[1:]) for joined in self.axes]
        wanted = [bounds[joined[0]] for joined in self.axes]
        part = read(tuple(slice(start * n, stop * n) for (start, stop), n in zip(wanted, inner, strict=True)))
        first = {joined[0] for joined in self.axes}
        sizes = [bounds[axis][1] - bounds[axis][0] if axis in first else self.shape[axis] for axis in self._order]
        rest = tuple(slice(None) if axis in first else slice(*bounds[axis]) for axis in self._order)
        return part.reshape(sizes)[rest].transpose(np.argsort(self._order))

    def to_tensor(self, array: np.ndarray) -> np.ndarray:
        """The contiguous tensor of our array (for one block)."""
        return np.ascontiguousarray(array.transpose(self._order).reshape(self.tensor_shape))


def layouts(family: str, abstract: dict, blocks: int) -> dict:
    """A tree of Layout.

    Args:
      family: name of the model family, see `language_model.FAMILIES`.
      abstract: tree of arrays or shapes as returned by `language_model.init`.
      blocks: number of blocks of the model.
    """

    checkpoint = language_model.checkpoint(family)

    def layout(path: tuple, array) -> Layout:
        *module, leaf = (entry.key for entry in path)
        weight = "bias" if leaf == "bias" else "weight"
        stacked = module[0] == "h"
        inside = module[1:] if stacked else module
        shape = array.shape[1:] if stacked else array.shape
        names = [".".join([*inside, weight])]
        if stacked:
            names = [f"{checkpoint.blocks}.{block}.{names[0]}" for block in range(blocks)]
        transposed = checkpoint.transposed and leaf == "kernel"
        plain = ((1,), (0,)) if transposed else tuple((axis,) for axis in range(len(shape)))
        return Layout(tuple(names), stacked, shape, checkpoint.joined_axes.get(".".join([*inside, leaf]), plain))

    return jax.tree_util.tree_map_with_path(layout, abstract)


def full_name(family: str, name: str) -> str:
    """The name with the prefix used in models with an output projection."""
    return name if name.startswith("lm_head.") else language_model.checkpoint(family).prefix + name
