"""Text to report in minutes on two CPU cores: documentation installed with Python, a tiny GPT-2, a memory beside it."""

from configs import default


def get_config():
    config = default.get_config()
    config.workdir = "runs/quickstart"
    config.corpus.max_bytes = 2_500_000
    config.tokenizer.vocab_size = 2048
    config.base.context_length = 128
    # Small enough to have flattened after these steps: more training gives it a small part of the memory's gain.
    config.base.width = 32
    config.base.training.steps = 4000
    config.targets.k = 64
    config.targets.leaves_to_search = 24  # keys of width 32 lie closer together: 13 leaves cost 0.02 of total variation
    # A test query has no neighbors in its own document; training ones without them made the better memory.
    config.targets.exclude = "document"
    config.memory.width = 256
    config.memory.blocks = 4
    config.training.epochs = 1.5
    config.training.batch_sequences = 32
    config.training.accumulation_steps = 4  # 1,024 positions at once stay in a CPU's caches
    config.training.warmup_steps = 20
    config.training.evaluate_every = 100
    config.training.checkpoint_every = 100
    # 10 MB of parameters: every device holds them all, and gradients are summed once a step.
    config.mesh.rules.embed = ""
    return config
