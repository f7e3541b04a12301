"""Perplexity by training compute at one size: GPT-2 xl on the Web mixture, five budgets, both arms.

mlpmem fit --runs=runs/web_compute --against=flops --output=runs/web_compute/fit
"""

from configs.sweeps import gpt2_sizes, point
from configs.sweeps.web_sizes import POSITIONS, web

PASSES = (1, 2, 4, 8, 16)  # passes of a memory of this size over the corpus
SEEDS = (0,)


def get_sweep():
    config = web()
    config.workdir = "runs/web_compute"
    points = []
    for passes in PASSES:
        flops = passes * POSITIONS * gpt2_sizes.memory_flops("xl")
        for seed in SEEDS:
            for arm in ("continued", "augmented"):
                overrides = gpt2_sizes.overrides("xl")
                points.append(point(f"p{passes}-{arm}-s{seed}", arm, flops, seed=seed, overrides=overrides))
    return {"config": config, "counted": "training", "positions": POSITIONS, "points": points}
