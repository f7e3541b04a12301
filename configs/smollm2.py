"""A memory for a real language model at a desk: SmolLM2-135M on the documentation installed with Python.

`make smollm2` fetches the model (93 MB, Apache-2.0) and runs this in 30 to 60 minutes on two CPU cores and 8 GiB. Text
of your own: --config.corpus.source=files --config.corpus.path=DIR --config.workdir=runs/mine.
"""

from configs import default

MODEL = ".cache/SmolLM2-135M-Instruct.Q4_1.gguf"  # what `make smollm2-model` leaves


def get_config():
    config = default.get_config()
    config.workdir = "runs/smollm2"
    config.corpus.max_bytes = 1_100_000
    config.tokenizer.source = "gguf"
    config.tokenizer.path = MODEL
    config.base.source = "gguf"
    config.base.path = MODEL
    config.datastore.input_depth = 0.85  # of 0.5, 0.7, 0.85 and 1.0 the best here; the paper's models prefer 0.7
    config.datastore.batch_sequences = 8  # 2,048 positions at once stay in a CPU's caches
    config.datastore.sequences_per_shard = 64
    config.targets.exclude = "document"
    config.memory.family = "llama"
    config.memory.width = 576
    config.memory.blocks = 4
    config.memory.feed_forward_width = 1536
    config.memory.output_from_base = True
    training = config.training
    training.epochs = 3.0
    training.batch_sequences = 8
    training.optimizer = "adamw"
    training.learning_rate = 5e-4
    training.beta2 = 0.999
    training.evaluate_every = 140
    training.checkpoint_every = 140
    return config
