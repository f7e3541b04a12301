"""From text to report in minutes on two CPU cores: documentation installed with Python, a tiny GPT-2, and a memory."""

from configs import default


def get_config():
    config = default.get_config()
    config.workdir = "runs/quickstart"
    config.corpus.max_bytes = 2_500_000
    config.tokenizer.vocab_size = 2048
    config.base.context_length = 128
    # Trained so far that as many FLOPs as the memory's, spent on the base, give half of what the memory gives.
    config.base.width = 96
    config.base.training.steps = 2500
    config.targets.k = 64
    # A test query has no neighbors in its own document; excluding them in training gave a better memory.
    config.targets.exclude = "document"
    config.memory.width = 256
    config.memory.blocks = 4
    config.training.alpha = 0.8  # better here than the paper's 0.4, and at a lower lambda
    config.training.epochs = 1.5
    config.training.batch_sequences = 32
    config.training.accumulation_steps = 4  # micro-batches of 1,024 positions fit a CPU's caches
    config.training.warmup_steps = 20
    config.training.evaluate_every = 100
    config.training.checkpoint_every = 100
    # 10 MB of parameters: they are replicated on every device, and gradients are summed once per step.
    config.mesh.rules.embed = ""
    return config
