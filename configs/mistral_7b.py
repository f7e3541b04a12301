"""Mistral-7B-v0.3 with the paper's 1B memory: 8 blocks of the base's feed-forward shape (extra `hub`; accelerators).

The paper trains it on 33,000,000 samples of a corpus of 5 billion tokens. So a sample is not one position but about
150; here it is a block of 128 consecutive positions, and every position of the corpus has targets. English Wikipedia is
a corpus of that size.
"""

from configs import default

SAMPLES = 33_000_000  # sequences
EPOCHS = 5
BATCH = 4 * 4 * 32  # sequences per optimizer step: the paper's per device x accumulation x devices
STEPS = EPOCHS * SAMPLES // BATCH


def get_config():
    config = default.get_config()
    config.workdir = "runs/mistral_7b"
    config.corpus.source = "hub"
    config.corpus.name = "wikimedia/wikipedia"
    config.corpus.subset = "20231101.en"
    config.corpus.validation_fraction = 0.001
    config.corpus.test_fraction = 0.001
    config.tokenizer.source = "hub"
    config.tokenizer.path = "mistralai/Mistral-7B-v0.3"  # 32,768 tokens
    config.base.source = "huggingface"
    config.base.path = "mistralai/Mistral-7B-v0.3"
    config.base.context_length = 128
    config.datastore.compute_dtype = "bfloat16"
    config.datastore.dtype = "bfloat16"  # products of the exact search take one pass
    config.datastore.input_depth = 0.7
    config.datastore.batch_sequences = 256
    config.datastore.sequences_per_shard = 256
    config.targets.k = 1024
    config.targets.backend = "exact"  # devices hold more of billions of keys than a host's memory and disk
    config.targets.recall_target = 0.95
    config.targets.key_shard_rows = 16_000_000  # use a hundred times more on a large slice (docs/neighbors.md)
    config.memory.family = "llama"
    config.memory.width = 4096
    config.memory.blocks = 8
    config.memory.feed_forward_width = 14336
    config.memory.output_from_base = True
    training = config.training
    training.alpha = 0.4
    training.steps = STEPS
    training.batch_sequences = BATCH
    training.accumulation_steps = 1
    training.optimizer = "adamw"
    training.learning_rate = 4e-4
    training.beta2 = 0.999
    training.schedule = "linear"
    training.warmup_steps = round(0.03 * STEPS)
    training.compute_dtype = "bfloat16"
    training.remat = False
    training.loss_chunk = 2048
    training.evaluate_every = 1000
    training.evaluation_sequences = 2048
    training.checkpoint_every = 1000
    return config
