"""Five sizes over 1.5 decades of parameters, both arms, two seeds, on two CPU cores: the paper's figure 1, smaller.

    mlpmem sweep --config=configs/sweeps/quickstart_sizes.py --workers=2
    mlpmem fit --runs=runs/quickstart_sizes --output=runs/quickstart_sizes/fit

As in the paper the memory is about as large as its base, the corpus is small for the larger models, and every base is
trained until it has converged, so that `continued` is not merely an unfinished base: bases are trained for 8 (the
largest) to 13 (the smallest) passes over the corpus, keeping the best on validation. Each arm gets a quarter of its
base's compute.

Learning rates are the same at every width: Muon's update of a matrix has a scale that does not depend on its size, and
the embeddings' Adam rate served widths of 32 to 256 in the quickstart.
"""

from configs import quickstart
from configs.sweeps import point

SIZES = {  # width, blocks, heads and steps of the base; blocks of the memory; budget of each arm in FLOPs
    "38k": (16, 1, 2, 4000, 2, 4.7e11),
    "95k": (32, 2, 2, 4000, 3, 1.2e12),
    "239k": (64, 2, 2, 3500, 3, 2.6e12),
    "545k": (96, 3, 4, 3000, 5, 5.2e12),
    "1270k": (128, 5, 4, 2500, 8, 1.02e13),
}
SEEDS = (0, 1)


def get_sweep():
    config = quickstart.get_config()
    config.workdir = "runs/quickstart_sizes"
    config.corpus.max_bytes = 2_000_000
    config.targets.leaves_to_search = 24  # one search for widths of 16 to 128
    config.training.alpha = 0.4  # the paper's
    config.training.evaluate_every = 100
    config.training.checkpoint_every = 200
    config.evaluation.sharpness_positions = 500
    points = []
    for size, (width, blocks, heads, steps, memory_blocks, flops) in SIZES.items():
        shared = {
            "base.width": width,
            "base.blocks": blocks,
            "base.heads": heads,
            "base.training.steps": steps,
            "memory.width": width,
            "memory.blocks": memory_blocks,
        }
        trained_on = shared | {"training.batch_sequences": config.base.training.batch_sequences}
        for seed in SEEDS:
            for arm, overrides in (("continued", trained_on), ("augmented", shared)):
                points.append(point(f"b{size}-{arm}-s{seed}", arm, flops, seed=seed, overrides=overrides))
    return {"config": config, "counted": "training", "positions": 0, "points": points}
