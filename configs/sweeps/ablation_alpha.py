"""The weight of the KL term, from cross entropy alone to the neighbors' distributions alone; GPT-2 small."""

from configs import wikitext103_gpt2_small
from configs.sweeps import gpt2_sizes, point
from configs.sweeps.wikitext103_sizes import PASSES, POSITIONS

ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
SEEDS = (0,)


def get_sweep():
    config = wikitext103_gpt2_small.get_config()
    config.workdir = "runs/ablation_alpha"
    flops = PASSES * POSITIONS * gpt2_sizes.memory_flops("small")
    points = []
    for alpha in ALPHAS:
        overrides = {"training.alpha": alpha}
        for seed in SEEDS:
            name, variant = f"alpha-{round(100 * alpha)}-s{seed}", f"alpha {alpha:g}"
            points.append(point(name, "augmented", flops, seed=seed, variant=variant, overrides=overrides))
    return {"config": config, "counted": "training", "positions": POSITIONS, "points": points}
