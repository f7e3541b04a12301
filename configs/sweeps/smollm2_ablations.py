"""What matters on a real model: SmolLM2-135M, one choice of its memory changed at a time.

    make smollm2-model
    mlpmem sweep --config=configs/sweeps/smollm2_ablations.py

The model was tuned to follow instructions, so that any training on plain text lowers its perplexity. It is first
trained on this text for one pass, that what a memory gains afterwards is not merely this. Validation and test are a
tenth of the text each. A point of three passes takes about 60 TFLOPs: five minutes on two CPU cores.
"""

from configs import smollm2
from configs.sweeps import memory_flops, point

VOCABULARY = 49_152
POSITIONS = 86_000  # of the training split, about
PASSES = 3
REFERENCE = {"datastore.input_depth": 0.7, "training.alpha": 0.4, "targets.k": 64, "memory.blocks": 4}
OTHERS = {
    "training.alpha": (0.0, 1.0),
    "datastore.input_depth": (0.5, 0.85, 1.0),
    "targets.k": (16, 256, 1024),
    "memory.blocks": (1, 8),
}
LONGER = ({"training.alpha": 0.4}, {"training.alpha": 0.0}, {"training.alpha": 1.0})
LONGER_PASSES = 10


def get_sweep():
    config = smollm2.get_config()
    config.workdir = "runs/smollm2_ablations"
    config.corpus.max_bytes = 400_000
    config.corpus.validation_fraction = config.corpus.test_fraction = 0.1
    base = config.base.training
    base.batch_sequences = config.training.batch_sequences
    config.base.finetune_steps = POSITIONS // (base.batch_sequences * config.base.context_length)
    base.evaluate_every = base.checkpoint_every = 1 + config.base.finetune_steps // 2
    config.training.evaluate_every = config.training.checkpoint_every = 42  # a pass
    memory = config.memory

    def budget(passes: int, blocks: int) -> float:
        """Training FLOPs of a memory of so many blocks for so many passes over the text."""
        return (
            passes
            * POSITIONS
            * memory_flops(memory.family, VOCABULARY, memory.width, blocks, memory.feed_forward_width)
        )

    choices = [{}, *({key: value} for key, values in OTHERS.items() for value in values)]
    points = []
    for passes, changes in ((PASSES, choices), (LONGER_PASSES, LONGER)):
        for change in changes:
            what = [f"{key.rpartition('.')[2].replace('_', ' ')} {value:g}" for key, value in change.items()]
            variant = ", ".join([f"{passes} passes", *(what or ["reference"])])
            overrides = REFERENCE | change
            points.append(
                point(
                    f"of-{variant}".replace(", ", "-").replace(" ", "-").replace(".", ""),
                    "augmented",
                    budget(passes, overrides["memory.blocks"]),
                    variant=variant,
                    overrides=overrides,
                )
            )
    compute = budget(PASSES, REFERENCE["memory.blocks"])
    overrides = {"training.learning_rate": 1e-4}  # a memory's rate is too high for parameters that were trained before
    points.append(point(f"of-{PASSES}-passes-continued", "continued", compute, overrides=overrides))
    return {"config": config, "counted": "training", "positions": 0, "points": points}
