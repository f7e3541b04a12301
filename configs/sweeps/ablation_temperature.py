"""The temperature of the neighbors' weights, with GPT-2 small. 0 is the one that is best on validation."""

from configs import wikitext103_gpt2_small
from configs.sweeps import gpt2_sizes, point
from configs.sweeps.wikitext103_sizes import PASSES, POSITIONS

TEMPERATURES = (0.0, 1.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
SEEDS = (0,)


def get_sweep():
    config = wikitext103_gpt2_small.get_config()
    config.workdir = "runs/ablation_temperature"
    flops = PASSES * POSITIONS * gpt2_sizes.memory_flops("small")
    points = []
    for temperature in TEMPERATURES:
        overrides = {"targets.temperature": temperature}
        for seed in SEEDS:
            name, variant = f"temperature-{round(temperature)}-s{seed}", f"temperature {temperature:g}"
            points.append(point(name, "augmented", flops, seed=seed, variant=variant, overrides=overrides))
    return {"config": config, "counted": "training", "positions": POSITIONS, "points": points}
