"""The depth of the base at which the memory reads, 20 to 100 %, at three sizes of GPT-2."""

from configs import wikitext103_gpt2_small
from configs.sweeps import gpt2_sizes, point
from configs.sweeps.wikitext103_sizes import PASSES, POSITIONS

DEPTHS = (20, 30, 40, 50, 60, 70, 80, 90, 100)  # percent
SEEDS = (0,)


def get_sweep():
    config = wikitext103_gpt2_small.get_config()
    config.workdir = "runs/ablation_input_depth"
    points = []
    for size in ("small", "medium", "large"):
        flops = PASSES * POSITIONS * gpt2_sizes.memory_flops(size)
        for depth in DEPTHS:
            overrides = gpt2_sizes.overrides(size) | {"datastore.input_depth": depth / 100}
            name, variant = f"{size}-depth-{depth}", f"depth {depth} %"
            points += [
                point(f"{name}-s{seed}", "augmented", flops, seed=seed, variant=variant, overrides=overrides)
                for seed in SEEDS
            ]
    return {"config": config, "counted": "training", "positions": POSITIONS, "points": points}
