"""The paper's figure 1 on WikiText-103: GPT-2 small to xl trained further, and small to large with a memory.

A budget is the cost of 50 passes of the size's memory over the corpus. The paper's bases are GPT-2 models fine-tuned on
the corpus: use folders of such models instead of the names in configs/sweeps/gpt2_sizes.py.
"""

from configs import wikitext103_gpt2_small
from configs.sweeps import gpt2_sizes, point

POSITIONS = 117_000_000  # approximate training positions of WikiText-103 in GPT-2's tokens
PASSES = 50
SEEDS = (0,)


def get_sweep():
    config = wikitext103_gpt2_small.get_config()
    config.workdir = "runs/wikitext103_sizes"
    points = []
    for size in gpt2_sizes.SIZES:
        flops = PASSES * POSITIONS * gpt2_sizes.memory_flops(size)
        for seed in SEEDS:
            for arm in ("continued",) if size == "xl" else ("continued", "augmented"):
                overrides = gpt2_sizes.overrides(size)
                points.append(point(f"{size}-{arm}-s{seed}", arm, flops, seed=seed, overrides=overrides))
    return {"config": config, "counted": "training", "positions": POSITIONS, "points": points}
