"""Targets from the keys of larger language models than the one augmented, GPT-2 small."""

from configs import wikitext103_gpt2_small
from configs.sweeps import gpt2_sizes, point
from configs.sweeps.wikitext103_sizes import PASSES, POSITIONS

KEY_MODELS = gpt2_sizes.NAMES | {"small": ""}  # its own keys
SEEDS = (0,)


def get_sweep():
    config = wikitext103_gpt2_small.get_config()
    config.workdir = "runs/ablation_key_model"
    flops = PASSES * POSITIONS * gpt2_sizes.memory_flops("small")
    points = []
    for size, key_model in KEY_MODELS.items():
        overrides = {"datastore.key_model": key_model, "targets.temperature": 0.0}
        for seed in SEEDS:
            name, variant = f"keys-{size}-s{seed}", f"keys of {size}"
            points.append(point(name, "augmented", flops, seed=seed, variant=variant, overrides=overrides))
    return {"config": config, "counted": "training", "positions": POSITIONS, "points": points}
