"""A memory for SmolLM2-135M on a library of prose in one JSONL file, sized for one H100 (extra `gguf`).

Each line of the file is {"text", "source", "path"}; parts of one book, path "book#0007", stay in one split.
To use another file: --config.corpus.path=FILE. `make smollm2-model` downloads the model.

Estimated cost: 12 MB of text are about 2.5 million training positions. A step of the memory costs
3 x 2 x (4 x 3 x 576 x 1536 + 576 x 49,152) = 234 MFLOP per position. 70 epochs are 175 million positions, 4.1e16 FLOP:
two to five minutes at 14 to 35 % of the peak, since most of a step is passes over logits. The products of the search,
2 x 2.5M^2 x 576 = 7e15 FLOP, take half a minute, and the selection of neighbors up to a few minutes more.
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
    training.epochs = 70.0
    training.batch_sequences = 64
    training.warmup_steps = 200
    training.compute_dtype = "bfloat16"
    training.loss_chunk = 4096
    training.evaluate_every = 1000
    training.checkpoint_every = 2000
    return config
