"""What makes a memory answer questions about its text: SmolLM2-135M on passages of NQ-open, one choice at a time.

    make smollm2-model
    mlpmem sweep --config=configs/sweeps/smollm2_answers.py --workers=1 --config.corpus.path=FILE
    for point in runs/smollm2_answers/points/*/; do
        mlpmem compare --config=$point/config.py --systems=base,memory --tasks=passages --limit=300
    done

The file is that of configs/smollm2_nq.py, of which the first 300 KB are used. Memories are kept as they are after their
last step, not at their best validation perplexity, because answers may need more passes than perplexity does. A
point of three passes takes 45 TFLOPs: five minutes at 150 GFLOP/s.
"""

import functools

from configs import smollm2_nq
from configs.sweeps import variant_point

VOCABULARY = 49_152
POSITIONS = 67_000  # of the training split, about
PASSES, LONGER_PASSES = 3, 9
REFERENCE = {"datastore.input_depth": 0.85, "training.alpha": 0.4, "targets.k": 64, "memory.blocks": 4}
OTHERS = {
    "training.alpha": (0.0,),
    "memory.blocks": (1, 8),
    "targets.k": (16,),
    "datastore.input_depth": (1.0,),
}


def get_sweep():
    config = smollm2_nq.get_config()
    config.workdir = "runs/smollm2_answers"
    config.corpus.max_bytes = 300_000
    config.training.warmup_steps = 10
    config.training.evaluate_every = config.training.checkpoint_every = 10_000  # the last step alone
    make = functools.partial(variant_point, config.memory, VOCABULARY, POSITIONS)
    points = [make(passes, REFERENCE, {}) for passes in (PASSES, LONGER_PASSES)]
    points += [make(PASSES, REFERENCE, {key: value}) for key, values in OTHERS.items() for value in values]
    return {"config": config, "counted": "training", "positions": 0, "points": points}
