"""The whole pipeline at the smallest size, for continuous integration. Its metrics are meaningless."""

from configs import default


def get_config():
    config = default.get_config()
    config.workdir = "runs/smoke"
    config.corpus.max_bytes = 300_000
    config.tokenizer.vocab_size = 1024
    config.base.context_length = 64
    config.base.training.steps = 100
    config.base.training.batch_sequences = 8
    config.base.training.evaluate_every = 50
    config.base.training.checkpoint_every = 50
    config.datastore.sequences_per_shard = 256
    config.targets.k = 16
    config.targets.quality_positions = 256
    config.memory.width = 64
    config.memory.blocks = 2
    config.training.steps = 100
    config.training.batch_sequences = 8
    config.training.evaluate_every = 50
    config.training.checkpoint_every = 50
    config.evaluation.sharpness_positions = 500
    return config
