"""Optimizers, learning-rate schedules and gradient accumulation."""

from __future__ import annotations

from collections.abc import Callable

import jax
import ml_collections
import optax
from jax.sharding import PartitionSpec
from optax.contrib import MuonDimensionNumbers, muon

from mlpmem_jax.core.errors import ConfigError
from mlpmem_jax.core.sharding import Sharding, is_axes


def schedule(settings: ml_collections.ConfigDict, total_steps: int) -> optax.Schedule:
    """Learning rate by optimizer step: linear warmup from 0 to `learning_rate`, then "linear" or "cosine" to 0, or
    "constant".

    Raises:
      ConfigError: the warmup leaves no step at the full rate, or the schedule is unknown.
    """
    return _schedule(settings, total_steps, settings.learning_rate)


def _schedule(settings: ml_collections.ConfigDict, total_steps: int, peak: float) -> optax.Schedule:
    warmup, rest = settings.warmup_steps, total_steps - settings.warmup_steps
    if rest < 1:
        raise ConfigError(
            f"warmup_steps: {warmup} steps of warmup, but the whole run has {total_steps} steps; "
            "lower warmup_steps, or train longer"
        )
    if settings.schedule == "linear":
        main = optax.linear_schedule(peak, 0.0, rest)
    elif settings.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, rest)
    elif settings.schedule == "constant":
        main = optax.constant_schedule(peak)
    else:
        raise ConfigError(f"schedule: expected 'linear', 'cosine' or 'constant', found {settings.schedule!r}")
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), main], [warmup])


def make_optimizer(settings: ml_collections.ConfigDict, total_steps: int, logical_axes) -> optax.GradientTransformation:
    """Clipping by global norm (`clip_norm`, 0 = none), then AdamW or Muon.

    AdamW decays matrices, not norms and biases. Muon (Newton-Schulz, momentum 0.95, updates scaled by
    sqrt(max(1, outputs / inputs))) optimizes the matrices of the blocks, each layer separately, at `learning_rate`,
    and decays only those; Adam with Nesterov momentum optimizes everything else at `adam_learning_rate`.

    Args:
      settings: a config group of `optimization` of configs/default.py.
      total_steps: optimizer steps of the whole run.
      logical_axes: tree like the parameters whose leaves are tuples of logical axis names.

    Raises:
      ConfigError: as in `schedule`, or the optimizer is unknown.
    """
    if settings.optimizer not in OPTIMIZERS:
        raise ConfigError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, found {settings.optimizer!r}")
    optimizer = OPTIMIZERS[settings.optimizer](settings, total_steps, logical_axes)
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), optimizer) if settings.clip_norm else optimizer


def _adamw(settings: ml_collections.ConfigDict, total_steps: int, logical_axes) -> optax.GradientTransformation:
    return optax.adamw(
        schedule(settings, total_steps),
        b1=settings.beta1,
        b2=settings.beta2,
        weight_decay=settings.weight_decay,
        mask=_decayed(logical_axes),
    )


def _muon(settings: ml_collections.ConfigDict, total_steps: int, logical_axes) -> optax.GradientTransformation:
    return muon(
        schedule(settings, total_steps),
        weight_decay=settings.weight_decay,
        adam_b1=settings.beta1,
        adam_b2=settings.beta2,
        adam_learning_rate=_schedule(settings, total_steps, settings.adam_learning_rate),
        muon_weight_dimension_numbers=jax.tree.map(_muon_dimensions, logical_axes, is_leaf=is_axes),
    )


OPTIMIZERS = {"adamw": _adamw, "muon": _muon}
"""Optimizers by their names in `core.config.OPTIMIZERS`: (settings, total steps, logical axes) -> transformation."""


def _decayed(logical_axes):
    """Which parameters decay; decided by name, because biases of heads have as many axes as matrices."""
    return jax.tree_util.tree_map_with_path(
        lambda path, axes: path[-1].key not in ("bias", "scale"), logical_axes, is_leaf=is_axes
    )


def _muon_dimensions(axes: tuple[str | None, ...]) -> MuonDimensionNumbers | None:
    """Inputs and outputs of a block's matrix; None for other parameters.

    One side of the matrix is "embed", the other starts at the next named axis: queries, keys and values, stored as
    ("layers", "embed", None, "heads", None), are three matrices from width to heads x head width.
    """
    named = [index for index, axis in enumerate(axes) if axis not in (None, "layers", "embed")]
    if axes[0] != "layers" or "embed" not in axes or not named:
        return None
    embed = axes.index("embed")
    other = tuple(index for index in range(named[0], len(axes)) if index != embed)
    return MuonDimensionNumbers((embed,), other) if embed < named[0] else MuonDimensionNumbers(other, (embed,))


def accumulated_value_and_grad(loss: Callable, steps: int) -> Callable:
    """`jax.value_and_grad(loss, has_aux=True)`, computed in sequential micro-batches.

    Each device splits its own rows into micro-batches, so that no rows move between devices.

    Args:
      loss: (parameters, frozen, batch) -> (loss, tree of statistics), floats, means over axis 0 of the batch's arrays.
      steps: number of micro-batches; divides axis 0 of every array of the batch.

    Returns:
      (parameters, frozen, batch) -> ((loss, statistics), gradients), all means over the whole batch.
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    if steps == 1:
        return value_and_grad

    def accumulated(parameters, frozen, batch):
        rows = jax.tree.leaves(batch)[0].shape[0]
        mean = optax.microbatching.AccumulationType.MEAN
        return optax.microbatching.microbatch(value_and_grad, 2, rows // steps, mean)(parameters, frozen, batch)

    return accumulated


def averaged_over_devices(value_and_grad: Callable, sharding: Sharding) -> Callable:
    """Plain data parallelism: each device processes its own rows, and the results are averaged once.

    Args:
      value_and_grad: (parameters, frozen, batch) -> tree of means over the rows of the batch.
      sharding: parameters are replicated; the batch is sharded.

    Returns:
      The same function for arrays on the mesh.
    """
    rows = sharding.spec("batch")

    def on_one_device(parameters, frozen, batch):
        return jax.lax.pmean(value_and_grad(parameters, frozen, batch), sharding.axes("batch"))

    whole = PartitionSpec()
    # Every output is an average, the same on all devices, so JAX need not track replication.
    return jax.shard_map(
        on_one_device, mesh=sharding.mesh, in_specs=(whole, whole, rows), out_specs=whole, check_vma=False
    )


def shared_by_layers(updates, logical_axes, sharding: Sharding):
    """Muon's updates of a replicated model, with layers distributed over the devices.

    Newton-Schulz iterations are the costly part of a step, and data parallelism does not divide them. Constraining the
    updates here to be sharded by layer makes the compiler distribute the iterations and gather the updates when they
    are applied. If the number of layers is not divisible, every device computes all of them.
    """
    shards, by_layers = sharding.shards("batch"), sharding.named("batch")

    def share(axes, update):
        if _muon_dimensions(axes) is None or update.shape[0] % shards:
            return update
        return jax.lax.with_sharding_constraint(update, by_layers)

    return jax.tree.map(share, logical_axes, updates, is_leaf=is_axes)
