"""GPT-2 of 1 to 63 million parameters, both arms at equal compute, on a library of prose, on one accelerator.

    mlpmem sweep --config=configs/sweeps/library_sizes.py
    mlpmem fit --runs=runs/library_sizes --output=runs/library_sizes/fit

The paper's figure 1 at sizes between the quickstart's and the paper's. The text file is that of
configs/library_h100.py. As in the paper the memory is about as large as its base. Every base is trained for 10 passes
over the corpus, keeping the best on validation, and each arm then gets the compute of 20 passes of the size's memory.

Estimated cost on an H100: all trainings 6e16 FLOP, four minutes at a quarter of the peak; the searches of
five sizes over 2.2 million keys about five; starting and compiling 25 tasks about six. A larger corpus,
--config.corpus.max_bytes=N, costs the square of that in the searches.
"""

from configs import library_h100
from configs.sweeps import memory_flops, point

VOCABULARY = 8192
POSITIONS = 2_200_000  # approximate training positions: 9 MB of text
BASE_PASSES, PASSES = 10, 20
SIZES = {  # width, blocks and heads of the base; blocks of the memory
    "1m": (96, 2, 2, 3),
    "3m": (192, 3, 3, 5),
    "9m": (320, 5, 5, 8),
    "23m": (512, 6, 8, 9),
    "63m": (768, 8, 12, 12),
}
SEEDS = (0,)


def get_sweep():
    return of_sizes(SIZES, POSITIONS)


def of_sizes(sizes: dict, positions: int) -> dict:
    """The sweep over other sizes, with budgets for `positions` training positions."""
    config = library_h100.get_config()
    config.workdir = "runs/library_sizes"
    config.corpus.max_bytes = 10_000_000
    config.tokenizer.source, config.tokenizer.path = "train", ""
    config.tokenizer.vocab_size = VOCABULARY
    config.base.source, config.base.path = "train", ""
    config.datastore.input_depth = 0.7  # the paper's
    config.memory.family = "gpt2"
    config.memory.feed_forward_width = 0
    config.memory.output_from_base = False
    for training in (config.base.training, config.training):
        training.optimizer = "muon"
        training.learning_rate = 0.02
        training.beta2 = 0.95
        training.batch_sequences = 64
        training.warmup_steps = 100
        training.compute_dtype = "bfloat16"
        training.loss_chunk = 4096
        training.evaluate_every = 200
        training.checkpoint_every = 1000
    step = config.base.training.batch_sequences * config.base.context_length
    config.base.training.steps = max(200, BASE_PASSES * positions // step)
    points = []
    for size, (width, blocks, heads, memory_blocks) in sizes.items():
        overrides = {
            "base.width": width,
            "base.blocks": blocks,
            "base.heads": heads,
            "memory.width": width,
            "memory.blocks": memory_blocks,
        }
        flops = PASSES * positions * memory_flops("gpt2", VOCABULARY, width, memory_blocks)
        for seed in SEEDS:
            for arm in ("continued", "augmented"):
                points.append(point(f"b{size}-{arm}-s{seed}", arm, flops, seed=seed, overrides=overrides))
    return {"config": config, "counted": "training", "positions": 0, "points": points}
