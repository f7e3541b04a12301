"""Sweeps as code: each file has a `get_sweep()`, and `mlpmem sweep --config=FILE` runs it.

A sweep is a dictionary:

    config    the config that every point starts from; its workdir contains the whole sweep
    counted   what a budget pays for: "training" (optimizer steps), or "training and targets" (also the forward passes
              of the datastore and the neighbor search; needs `positions`)
    positions training positions of the corpus, needed if targets are counted; 0 = not needed
    points    a list of dictionaries from `point`
"""

import ml_collections

from mlpmem_jax.models import flops
from mlpmem_jax.models.memory import MemoryConfig


def memory_flops(family: str, vocabulary: int, width: int, blocks: int, feed_forward_width: int = 0) -> int:
    """FLOPs per position of a memory's training, forward and backward, for a base of the same width.

    Args:
      vocabulary: size of the vocabulary, including padding.
      feed_forward_width: 0 = four times the width.
    """
    wide = feed_forward_width or 4 * width
    return 3 * flops.memory_forward(MemoryConfig(family, vocabulary, vocabulary, width, width, blocks, wide))


def point(
    name: str, arm: str, flops: float, *, seed: int = 0, variant: str = "", overrides: dict | None = None
) -> dict:
    """One trained model.

    Args:
      name: lowercase letters, digits and "-"; also the name of its folder.
      arm: "continued" (the base trained further) or "augmented" (base and memory, of which the memory is trained).
      flops: training compute, which determines the number of steps.
      seed: seed of the arm's training; points that differ only in it share the base and the targets.
      variant: a label for other differences from the arm's points; appended to the arm's name in the column `arm`.
      overrides: config key -> value, e.g. {"base.width": 32}. `training` has the settings of the training that the
        budget pays for, in either arm.
    """
    return {
        "name": name,
        "arm": arm,
        "flops": flops,
        "seed": seed,
        "variant": variant,
        "overrides": dict(overrides or {}),
    }


def variant_point(
    memory: ml_collections.ConfigDict,
    vocabulary: int,
    positions: int,
    passes: int,
    reference: dict,
    change: dict,
    seed: int = 0,
) -> dict:
    """A point whose memory is trained for some passes, with one choice of a reference changed.

    Args:
      memory: the sweep's config.memory.
      vocabulary: as in `memory_flops`.
      positions: positions of the training split, about.
      passes: passes over them, for which the budget pays.
      reference: overrides of the reference, with "memory.blocks".
      change: those that differ in this point; {} for the reference itself.
      seed: as in `point`; seeds share a variant.
    """
    what = [f"{key.rpartition('.')[2].replace('_', ' ')} {value:g}" for key, value in change.items()]
    variant = ", ".join([f"{passes} passes", *(what or ["reference"])])
    name = f"of-{variant}" + (f"-seed-{seed}" if seed else "")
    overrides = reference | change
    per_position = memory_flops(
        memory.family, vocabulary, memory.width, overrides["memory.blocks"], memory.feed_forward_width
    )
    return point(
        name.replace(", ", "-").replace(" ", "-").replace(".", ""),
        "augmented",
        passes * positions * per_position,
        seed=seed,
        variant=variant,
        overrides=overrides,
    )
