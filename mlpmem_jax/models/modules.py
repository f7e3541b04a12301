"""Between flax NNX modules, which say what a network's parameters are, and plain dictionaries of arrays.

Everywhere outside `models/` parameters are nested dictionaries and networks are pure functions of them. A module
is built abstractly, filled with the dictionary's arrays and called: building costs time while tracing, never while
running.
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


def unstack(parameters: dict) -> dict:
    """The same parameters with those of the blocks, `h`, as a tuple of one tree for each block."""
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
    """Run blocks `start` to `stop` one after the other: carry = call(module of the block, carry).

    Stacked parameters are scanned. Unstacked ones are a program without a loop: it reads each weight in place, which
    a decode step needs, and takes longer to compile. The backward pass keeps the results of matrix products inside a
    block and computes everything else again; with `remat` it keeps the carry alone. `prepare` changes the parameters of
    a block where they are used, and again in the backward pass; `unroll` blocks make one iteration of the loop.
    """
    if isinstance(blocks, tuple):
        for parameters in blocks[start:stop]:
            carry = call(bind(build, parameters), carry)
        return carry

    # Storing activations costs more than computing norms, activation functions and softmax twice, on CPU as well.
    policies = jax.checkpoint_policies
    policy = policies.nothing_saveable if remat else policies.dots_with_no_batch_dims_saveable

    @functools.partial(jax.checkpoint, policy=policy, prevent_cse=remat and unroll > 1)
    def body(carry, parameters):
        return call(bind(build, prepare(parameters) if prepare else parameters), carry), None

    chosen = jax.tree.map(lambda array: array[start:stop], blocks)
    return jax.lax.scan(body, carry, chosen, unroll=unroll)[0]


def constrain(x: jax.Array, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Places an activation; None leaves it to the compiler.

    Without it the compiler may prefer moving activations to gathering the parameters of one block at a time.
    """
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


def _abstract(build: Build) -> nnx.Module:
    return nnx.eval_shape(lambda: build(nnx.Rngs(0)))
