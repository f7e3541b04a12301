"""A memory for SmolLM2-135M on a library of prose in one JSONL file, sized for one H100 (extra `gguf`).

Each line of the file is {"text", "source", "path"}; parts of one book, path "book#0007", stay in one split.
To use another file: --config.corpus.path=FILE. `make smollm2-model` downloads the model.

12 MB of text are 2.4 million training positions. A step of the memory costs 3 x 2 x (4 x 3 x 576 x 1536 + 576 x 49,152)
= 234 MFLOP per position; 10 epochs are 24 million positions, 5.7e15 FLOP. The products of the search cost
2 x 2.4M^2 x 576 = 7e15 FLOP, the selection of neighbors several times as long. docs/accelerator.md has measured times.
"""

from configs import smollm2


def get_config():
    config = smollm2.get_config()
    config.workdir = "runs/library_h100"
    config.corpus.source = "files"
    config.corpus.path = "data/library/library.jsonl.zst"
    config.corpus.group_key = "source+path"
    config.corpus.max_bytes = 12_000_000
    config.datastore.compute_dtype = "bfloat16"
    config.datastore.dtype = "bfloat16"  # products of the exact search take one pass
    config.datastore.batch_sequences = 64
    config.datastore.sequences_per_shard = 256
    config.targets.backend = "exact"
    config.targets.key_shard_rows = 8_000_000
    training = config.training
    training.epochs = 10.0
    training.batch_sequences = 64
    training.warmup_steps = 200
    training.compute_dtype = "bfloat16"
    training.loss_chunk = 4096
    training.evaluate_every = 100
    training.checkpoint_every = 500
    return config
