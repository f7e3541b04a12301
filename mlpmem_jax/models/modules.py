"""Converts between flax NNX modules, which define a network's parameters, and plain dictionaries of arrays.

Outside `models/`, parameters are nested dictionaries and networks are pure functions of them. A module is built
abstractly, filled with the dictionary's arrays and called: building costs time only while tracing, not while running.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from flax import nnx

Build = Callable[[nnx.Rngs], nnx.Module]


def initialize(build: Build, key: jax.Array) -> dict:
    """Fresh parameters of the module as a nested dictionary of float32 arrays; `key` is a PRNG key."""
    return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key)), nnx.Param))


def logical_axes(build: Build) -> dict:
    """The tree of `initialize` with each array replaced by the tuple of its logical axis names."""

    def names(parameter: nnx.Param) -> tuple[str | None, ...]:
        axes = parameter.get_metadata("logical_axes")
        return ("layers",) * (len(parameter.shape) - len(axes)) + axes

    return nnx.to_pure_dict(nnx.state(_abstract(build), nnx.Param), extract_fn=names)


def bind(build: Build, parameters: dict) -> nnx.Module:
    """The module with the arrays of `parameters`, a tree like that of `initialize`."""
    graph, state = nnx.split(_abstract(build))
    nnx.replace_by_pure_dict(state, parameters)
    return nnx.merge(graph, state)


def stack(build: Build, count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` modules of the same shape as one, each parameter with a leading axis of that length."""
    return nnx.vmap(lambda key: build(nnx.Rngs(key)))(jax.random.split(rngs.params(), count))


def unstack(parameters: dict) -> dict:
    """The same parameters with those of the blocks, `h`, as a tuple of one tree per block."""
    count = jax.tree.leaves(parameters["h"])[0].shape[0]
    blocks = (jax.tree.map(lambda array, i=i: array[i], parameters["h"]) for i in range(count))
    return {**parameters, "h": tuple(blocks)}


@jax.named_scope("blocks")
def run(
    call: Callable,
    build: Build,
    blocks: dict | tuple,
    carry,
    *,
    start: int = 0,
    stop: int | None = None,
    remat: bool = False,
    prepare: Callable[[dict], dict] | None = None,
    unroll: int = 1,
):
    """Runs blocks `start` to `stop` in sequence: carry = call(module of the block, carry).

    Stacked parameters are scanned. Unstacked ones become a program without a loop, which reads each weight in place, as
    a decode step needs, but takes longer to compile. The backward pass keeps the results of matrix products inside a
    block and recomputes everything else; with `remat` it keeps only the carry. `prepare` transforms the parameters of a
    block where they are used, and again in the backward pass; `unroll` is the number of blocks per loop iteration.
    """
    if isinstance(blocks, tuple):
        for parameters in blocks[start:stop]:
            carry = call(bind(build, parameters), carry)
        return carry

    # Storing activations costs more than recomputing norms, activation functions and softmax, even on CPUs.
    policies = jax.checkpoint_policies
    policy = policies.nothing_saveable if remat else policies.dots_with_no_batch_dims_saveable

    @functools.partial(jax.checkpoint, policy=policy, prevent_cse=remat and unroll > 1)
    def body(carry, parameters):
        return call(bind(build, prepare(parameters) if prepare else parameters), carry), None

    chosen = jax.tree.map(lambda array: array[start:stop], blocks)
    return jax.lax.scan(body, carry, chosen, unroll=unroll)[0]


def constrain(x: jax.Array, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Constrains the sharding of an activation; None leaves it to the compiler.

    Without it the compiler may move activations rather than gather the parameters of one block at a time.
    """
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


def _abstract(build: Build) -> nnx.Module:
    return nnx.eval_shape(lambda: build(nnx.Rngs(0)))
