"""What matters on a real model: SmolLM2-135M, one choice of its memory changed at a time.

    make smollm2-model
    mlpmem sweep --config=configs/sweeps/smollm2_ablations.py --workers=1

The model was tuned to follow instructions, so that any training on plain text lowers its perplexity. It is first
trained on this text for one pass, that what a memory gains afterwards is not merely this. Validation and test are a
tenth of the text each. A point of three passes takes 45 TFLOPs: five minutes at 150 GFLOP/s.
"""

import functools

from configs import smollm2
from configs.sweeps import point, variant_point

VOCABULARY = 49_152
POSITIONS = 64_000  # of the training split, about
PASSES, LONGER_PASSES = 3, 9
REFERENCE = {"datastore.input_depth": 0.7, "training.alpha": 0.4, "targets.k": 64, "memory.blocks": 4}
WITHOUT_TARGETS = {"training.alpha": 0.0}
OTHERS = {
    "training.alpha": (1.0,),
    "datastore.input_depth": (0.5, 0.85, 1.0),
    "memory.blocks": (1, 8),
    "targets.k": (16, 256, 1024),
}
SEEDS = (0, 1, 2)  # of the reference and of the memory without targets


def get_sweep():
    config = smollm2.get_config()
    config.workdir = "runs/smollm2_ablations"
    config.corpus.max_bytes = 300_000
    config.corpus.validation_fraction = config.corpus.test_fraction = 0.1
    base = config.base.training
    base.batch_sequences = config.training.batch_sequences
    config.base.finetune_steps = POSITIONS // (base.batch_sequences * config.base.context_length)
    base.evaluate_every = base.checkpoint_every = 1 + config.base.finetune_steps // 2
    config.training.warmup_steps = 10
    config.training.evaluate_every = config.training.checkpoint_every = 31  # a pass
    make = functools.partial(variant_point, config.memory, VOCABULARY, POSITIONS)
    points = [make(PASSES, REFERENCE, change, seed) for seed in SEEDS for change in ({}, WITHOUT_TARGETS)]
    points += [make(PASSES, REFERENCE, {key: value}) for key, values in OTHERS.items() for value in values]
    points += [make(LONGER_PASSES, REFERENCE, change) for change in ({}, WITHOUT_TARGETS)]
    compute = make(PASSES, REFERENCE, {})["flops"]
    points.append(point(f"of-{PASSES}-passes-continued", "continued", compute))
    return {"config": config, "counted": "training", "positions": 0, "points": points}
