"""The paper's WikiText-103 experiment with GPT-2 small and the 124M memory (extra `hub`; accelerators).

Targets come from GPT-2 xl's keys, as in the paper. The paper's base is GPT-2 fine-tuned on WikiText-103: set the
folder of such a model with --config.base.path=DIR, or fine-tune the pretrained model named below with
--config.base.finetune_steps=N.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.workdir = "runs/wikitext103_gpt2_small"
    config.corpus.source = "hub"
    config.corpus.name = "Salesforce/wikitext"
    config.corpus.subset = "wikitext-103-raw-v1"
    config.corpus.articles = "wikitext"
    config.tokenizer.source = "hub"
    config.tokenizer.path = "openai-community/gpt2"
    config.base.source = "huggingface"
    config.base.path = "openai-community/gpt2"
    config.base.context_length = 1024
    config.datastore.key_model = "openai-community/gpt2-xl"
    config.datastore.compute_dtype = "bfloat16"
    config.datastore.input_depth = 0.7
    config.datastore.batch_sequences = 64
    config.datastore.sequences_per_shard = 64
    config.targets.k = 1024
    config.targets.temperature = 16.0
    config.targets.key_shard_rows = 8_000_000  # an index of 72 GB: a TPU VM has 100 GB of disk
    config.targets.training_sample = 1_000_000
    config.memory.family = "gpt2"
    config.memory.width = 768
    config.memory.blocks = 18
    config.memory.output_from_base = True
    training = config.training
    training.alpha = 0.4
    training.epochs = 50.0
    training.batch_sequences = 128
    training.optimizer = "adamw"
    training.learning_rate = 5e-4
    training.beta2 = 0.999
    training.schedule = "linear"
    training.warmup_steps = 2000
    training.compute_dtype = "bfloat16"
    training.loss_chunk = 2048
    training.evaluate_every = 1000
    training.checkpoint_every = 1000
    return config
