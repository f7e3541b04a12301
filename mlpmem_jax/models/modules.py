"""Between flax NNX modules, which say what a network's parameters are, and plain dictionaries of arrays.

Everywhere outside `models/` parameters are nested dictionaries and networks are pure functions of them. A module is
built abstractly, filled with the dictionary's arrays and called: building costs time while tracing, never while running.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import nnx

Build = Callable[[nnx.Rngs], nnx.Module]


def initialize(build: Build, key: jax.Array) -> dict:
    """Fresh parameters of the module as a nested dictionary of float32 arrays; `key` is a PRNG key."""
    return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key)), nnx.Param))


def logical_axes(build: Build) -> dict:
    """The tree of `initialize` with, for every array, the tuple of its logical axis names."""

    def names(parameter: nnx.Param) -> tuple[str | None, ...]:
        axes = parameter.get_metadata("logical_axes")
        return ("layers",) * (len(parameter.shape) - len(axes)) + axes

    return nnx.to_pure_dict(nnx.state(_abstract(build), nnx.Param), extract_fn=names)


def bind(build: Build, parameters: dict) -> nnx.Module:
    """The module with the arrays of `parameters` (a tree like that of `initialize`) in place."""
    graph, state = nnx.split(_abstract(build))
    nnx.replace_by_pure_dict(state, parameters)
    return nnx.merge(graph, state)


def stack(build: Build, count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` modules of the same shape held as one, each parameter with a leading axis of that length."""
    return nnx.vmap(lambda key: build(nnx.Rngs(key)))(jax.random.split(rngs.params(), count))


def scan(stacked: nnx.Module, carry, *, start: int = 0, stop: int | None = None, remat: bool = False, call: Callable):
    """Run modules `start` to `stop` of a stack one after the other: carry = call(module, carry).

    With `remat` the activations inside a module are computed again in the backward pass instead of kept.
    """
    graph, state = nnx.split(stacked)
    if (start, stop) != (0, None):
        state = jax.tree.map(lambda array: array[start:stop], state)

    def body(carry, state):
        return call(nnx.merge(graph, state), carry), None

    return jax.lax.scan(jax.checkpoint(body) if remat else body, carry, state)[0]


def _abstract(build: Build) -> nnx.Module:
    return nnx.eval_shape(lambda: build(nnx.Rngs(0)))
