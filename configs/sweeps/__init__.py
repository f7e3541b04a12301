"""Sweeps as code: each file has a `get_sweep()`, and `mlpmem sweep --config=FILE` runs it.

A sweep is a dictionary:

    config    the config that every point starts from; its workdir holds the whole sweep
    counted   what a budget pays for: "training" (the optimizer's steps), or "training and targets" (the forward passes
              of the datastore and the search for neighbors as well; needs `positions`)
    positions training positions of the corpus, where targets are counted before there are any; 0 = not needed
    points    a list of dictionaries, made by `point`
"""

from mlpmem_jax.models import flops
from mlpmem_jax.models.memory import MemoryConfig


def memory_flops(family: str, vocabulary: int, width: int, blocks: int, feed_forward_width: int = 0) -> int:
    """FLOPs of one position of a memory's training, forward and backward, beside a base of its own width.

    Args:
      vocabulary: with what it is padded by.
      feed_forward_width: 0 = four times the width.
    """
    wide = feed_forward_width or 4 * width
    return 3 * flops.memory_forward(MemoryConfig(family, vocabulary, vocabulary, width, width, blocks, wide))


def point(
    name: str, arm: str, flops: float, *, seed: int = 0, variant: str = "", overrides: dict | None = None
) -> dict:
    """One trained model.

    Args:
      name: lower-case letters, digits and "-"; its folder.
      arm: "continued" (the base trained on) or "augmented" (base and memory, the memory trained).
      flops: training compute; steps follow from it.
      seed: of the arm's training; points of one size that differ in it alone share the base and the targets.
      variant: what else tells it from the arm's other points; stands in the column `arm` behind the arm's name.
      overrides: config key -> value, e.g. {"base.width": 32}. `training` holds the settings of what the budget is spent
        on, in either arm.
    """
    return {
        "name": name,
        "arm": arm,
        "flops": flops,
        "seed": seed,
        "variant": variant,
        "overrides": dict(overrides or {}),
    }
