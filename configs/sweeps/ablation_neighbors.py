"""The number of neighbors per target, 1 to 2048, with GPT-2 small. All points share one datastore."""

from configs import wikitext103_gpt2_small
from configs.sweeps import gpt2_sizes, point
from configs.sweeps.wikitext103_sizes import PASSES, POSITIONS

NEIGHBORS = tuple(2**power for power in range(12))
SEEDS = (0,)


def get_sweep():
    config = wikitext103_gpt2_small.get_config()
    config.workdir = "runs/ablation_neighbors"
    flops = PASSES * POSITIONS * gpt2_sizes.memory_flops("small")
    points = []
    for k in NEIGHBORS:
        overrides = {"targets.k": k}
        for seed in SEEDS:
            name, variant = f"k-{k}-s{seed}", f"k {k}"
            points.append(point(name, "augmented", flops, seed=seed, variant=variant, overrides=overrides))
    return {"config": config, "counted": "training", "positions": POSITIONS, "points": points}
