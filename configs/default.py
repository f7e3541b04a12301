"""Every config key with its default, its unit and its meaning. The other configs start from this one.

Values are overridden in another config file, or on the command line:
    mlpmem run --config=configs/quickstart.py --config.targets.k=128
"""

import ml_collections


def optimization() -> ml_collections.ConfigDict:
    """Settings of a training run; `base.training` and `training` share them."""
    config = ml_collections.ConfigDict()
    config.steps = 0  # optimizer steps; 0 = from epochs
    config.epochs = 1.0  # passes over the training split; not used when steps > 0
    config.batch_sequences = 16  # sequences in one optimizer step, over all devices
    config.accumulation_steps = 1  # micro-batches that one optimizer step is split into
    config.optimizer = "muon"  # "muon" or "adamw" (the paper)
    config.learning_rate = 0.02  # peak, of the matrices under muon, of everything under adamw
    config.adam_learning_rate = 0.002  # peak, of everything but the blocks' matrices under muon
    config.schedule = "linear"  # "linear", "cosine" or "constant", after the warmup
    config.warmup_steps = 50  # steps of linear warmup
    config.weight_decay = 0.0  # decoupled, of matrices alone
    config.beta1 = 0.9  # first moment (and momentum of muon: 0.95)
    config.beta2 = 0.95  # second moment
    config.clip_norm = 1.0  # global norm of the gradient
    config.compute_dtype = "float32"  # of activations and matmul inputs; parameters and loss are float32
    config.remat = False  # recompute blocks in the backward pass
    config.loss_chunk = 512  # positions per device whose logits exist at once
    config.seed = 0  # initial parameters and order of the sequences
    config.evaluate_every = 500  # steps between validations; the best parameters are kept
    config.evaluation_sequences = 0  # validation sequences used for that; 0 = all
    config.checkpoint_every = 500  # steps between checkpoints
    config.profile_steps = ""  # "A:B" traces steps A to B for TensorBoard and xprof; "" = none
    return config


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.workdir = "runs/default"  # where all artifacts go: a local path, gs:// or s3://

    config.corpus = corpus = ml_collections.ConfigDict()
    corpus.source = "installed_docs"  # "installed_docs", "files" or "hub"
    corpus.packages = ""  # "installed_docs": installed packages, with commas between, whose documentation is added
    corpus.path = ""  # file or folder (text, JSON, Parquet; plain, gz, zst, bz2, xz) for "files"
    corpus.name = ""  # Hugging Face data set for "hub", NAME or NAME@REVISION; several, with commas between, are mixed
    corpus.subset = ""  # its configuration, e.g. "wikitext-103-raw-v1"; as many entries as names, or one for all
    corpus.text_key = "text"  # field of rows that holds the text, e.g. "data.text" or "title+text"; entries likewise
    corpus.group_key = ""  # field of rows whose equal values stay on one side of a split, e.g. "book"; entries likewise
    corpus.group_part = r"#\d+$"  # what is no part of such a value: the 0007 of "book#0007" numbers a piece of the book
    corpus.articles = ""  # "wikitext": text files or lines in WikiText's format, of whole articles; entries likewise
    corpus.split_by_name = False  # "files": split by names of files and folders (train*, valid*, test*), not by hash
    corpus.max_bytes = 0  # a deterministic sample of documents up to this many bytes; 0 = all
    corpus.document_bytes = 8192  # longer text files become documents of about this size, ending at blank lines
    corpus.validation_fraction = 0.05  # of the text, in whole files, articles or groups
    corpus.test_fraction = 0.05  # likewise
    corpus.seed = 0  # of the sample and the split

    config.tokenizer = tokenizer = ml_collections.ConfigDict()
    # "train" (byte-level BPE on the training split), "file" (tokenizer.json), "gguf" (of such a model) or "hub"
    tokenizer.source = "train"
    tokenizer.path = ""  # the file, or the Hugging Face NAME or NAME@REVISION
    tokenizer.end_of_text = ""  # token that ends a document; "" = <|endoftext|>, </s> or the like, or its eos_token
    tokenizer.vocab_size = 4096  # tokens, of a trained tokenizer

    config.base = base = ml_collections.ConfigDict()
    base.source = "train"  # "train", "huggingface" or "gguf"
    # Hugging Face folder, or NAME or NAME@REVISION, of a GPT-2, Llama or Mistral; a GGUF file of a Llama or Mistral
    base.path = ""
    # Steps that an imported base is trained on the corpus before its keys are taken, its batch and precision from
    # base.training, by AdamW at the best of a few small rates; 0 = as it is
    base.finetune_steps = 0
    base.context_length = 256  # positions of one sequence (block), in every stage
    base.width = 64  # of the trained base
    base.blocks = 2
    base.heads = 2
    base.training = optimization()

    config.datastore = datastore = ml_collections.ConfigDict()
    datastore.dtype = "float16"  # of keys and memory inputs: "float16" or "bfloat16"
    datastore.compute_dtype = "float32"  # of the forward pass: "float32", or "bfloat16" on accelerators
    datastore.input_depth = 1.0  # relative depth of the memory's input: 1.0 = the keys, 0.7 = the paper's best
    datastore.key_model = ""  # Hugging Face model whose keys the targets are built from; "" = the base
    datastore.batch_sequences = 32  # sequences in one forward pass, over all devices
    datastore.sequences_per_shard = 256  # sequences that are written as one shard

    config.targets = targets = ml_collections.ConfigDict()
    targets.backend = "auto"  # "scann", "exact", or "auto": scann where it is installed
    targets.k = 64  # neighbors
    targets.temperature = 0.0  # squared-L2 units; 0 = best validation likelihood of the kNN-LM mixture
    targets.exclude = (
        "self"  # what a query may not retrieve: "self" (the paper), or "document": its file, article or group
    )
    targets.keep = 0  # largest probabilities kept per position; 0 = all
    targets.minimum_probability = 1e-8  # smaller probabilities are dropped
    targets.key_shard_rows = 2_000_000  # keys in one index; bounds the memory of a process (docs/neighbors.md)
    targets.recall = 0.95  # share of the true neighbors that the search has to return; below it the stage stops
    targets.search_dimensions = 0  # principal components that candidates are searched in; 0 = all dimensions
    targets.recall_target = 1.0  # exact backend on several devices: 1 = exact selection, less = faster on TPUs
    targets.leaves = 0  # partitions of one index; 0 = from the number of keys
    targets.leaves_to_search = 0  # partitions searched; 0 = as many as reach the recall
    targets.reorder = 0  # candidates scored exactly; 0 = as many as reach the recall
    targets.training_sample = 100_000  # keys that the partitions are trained on
    targets.quality_positions = 2048  # training positions on which recall and total variation are measured

    config.memory = memory = ml_collections.ConfigDict()
    memory.family = "gpt2"  # "gpt2" (LayerNorm, GELU) or "llama" (RMSNorm, SwiGLU)
    memory.width = 256
    memory.blocks = 4
    memory.feed_forward_width = 0  # 0 = 4 x width; the paper: the base's
    memory.output_from_base = False  # output projection starts as the base LM's (needs the base's width)

    config.training = training = optimization()
    training.mode = "offline"  # memory inputs from the datastore; "online" = base LM inside the step
    training.alpha = 0.4  # weight of the KL term (the paper: 0.4); the rest is cross entropy
    training.start = ""  # a finished memory (an imported one, say) to start from; "" = fresh parameters

    config.evaluation = evaluation = ml_collections.ConfigDict()
    evaluation.confidence = 0.95  # probability content of the intervals
    evaluation.sharpness_positions = 4000  # test positions whose whole distributions are looked at
    evaluation.seed = 0  # which positions these are

    config.comparison = comparison = ml_collections.ConfigDict()
    # "base", "memory", "knn_lm", "rag", "cpt", "lora", "memory+rag", "cpt+memory"
    comparison.systems = "base,memory,knn_lm,rag,cpt,lora"
    comparison.tasks = "passages"  # names of mlpmem_jax/comparison/tasks/, with commas between
    comparison.data = "data/evaluation"  # folder of the tasks' files (docs/evaluation.md)
    comparison.hub = False  # files that this folder lacks are written there from the Hugging Face hub (extra `hub`)
    comparison.limit = 0  # questions of each task, drawn by the seed; 0 = all
    comparison.tuning_questions = 500  # of a validation split, on which lambda is tuned
    comparison.retriever = "bm25"  # or the folder of a sentence encoder
    comparison.passages = 5  # in a prompt with passages
    comparison.passage_words = 100  # most words of one passage
    comparison.k = 0  # neighbors of kNN-LM; 0 = targets.k
    comparison.speed = ml_collections.ConfigDict()  # of `mlpmem compare --speed`
    comparison.speed.positions = (
        "10000,100000,1000000,10000000"  # of the corpora that are searched, with commas between
    )
    comparison.speed.prompt_tokens = 64
    comparison.speed.new_tokens = 16
    comparison.speed.rounds = 3  # whose median is shown
    comparison.seed = 0  # of the questions drawn and the halves that lambda is tuned on

    config.mesh = mesh = ml_collections.ConfigDict()
    mesh.slice = 1  # data parallel over the data-center network
    mesh.fsdp = -1  # fully sharded data parallel; -1 = all remaining devices
    mesh.tensor = 1  # tensor parallel
    # Logical axis -> mesh axes, "+" between several, "" for none.
    mesh.rules = ml_collections.ConfigDict(
        {"batch": "slice+fsdp", "embed": "fsdp", "mlp": "tensor", "heads": "tensor", "vocab": "tensor"}
    )
    return config
