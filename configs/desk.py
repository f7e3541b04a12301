"""The whole built-in corpus on two CPU cores, in at most 90 minutes."""

from configs import quickstart


def get_config():
    config = quickstart.get_config()
    config.workdir = "runs/desk"
    config.corpus.max_bytes = 0
    config.base.training.steps = 6000
    config.base.training.evaluate_every = 1000
    config.base.training.checkpoint_every = 1000
    config.targets.key_shard_rows = 6_000_000
    config.targets.leaves_to_search = 32
    config.memory.width = 384
    config.training.epochs = 3.0
    config.training.batch_sequences = 64
    config.training.accumulation_steps = 8
    config.training.evaluate_every = 200
    config.training.evaluation_sequences = 400
    config.training.checkpoint_every = 100
    return config
