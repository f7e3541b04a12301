"""Every config key with its default, unit and meaning. The other configs start from this one.

Override values in another config file or on the command line:
    mlpmem run --config=configs/quickstart.py --config.targets.k=128
"""

import ml_collections


def optimization() -> ml_collections.ConfigDict:
    """Settings of a training run; `base.training` and `training` share them."""
    config = ml_collections.ConfigDict()
    config.steps = 0  # optimizer steps; 0 = from epochs
    config.epochs = 1.0  # passes over the training split; ignored if steps > 0
    config.batch_sequences = 16  # sequences per optimizer step, over all devices
    config.accumulation_steps = 1  # micro-batches per optimizer step
    config.optimizer = "muon"  # "muon" or "adamw" (the paper)
    config.learning_rate = 0.02  # peak rate; of the blocks' matrices with muon, of all parameters with adamw
    config.adam_learning_rate = 0.002  # peak rate of everything except the blocks' matrices, with muon
    config.schedule = "linear"  # "linear", "cosine" or "constant", after the warmup
    config.warmup_steps = 50  # steps of linear warmup
    config.weight_decay = 0.0  # decoupled, of matrices only
    config.beta1 = 0.9  # first moment (muon's momentum is 0.95)
    config.beta2 = 0.95  # second moment
    config.clip_norm = 1.0  # maximum global norm of the gradient; 0 = no clipping
    config.compute_dtype = "float32"  # of activations and matmul inputs; parameters and loss are float32
    config.remat = False  # recompute blocks in the backward pass
    config.loss_chunk = 512  # positions per device whose logits are in memory together
    config.seed = 0  # of initial parameters and order of sequences
    config.evaluate_every = 500  # steps between validations; the best parameters are kept
    config.evaluation_sequences = 0  # validation sequences used for this; 0 = all
    config.checkpoint_every = 500  # steps between checkpoints
    config.profile_steps = ""  # "A:B" traces steps A to B for TensorBoard and xprof; "" = none
    return config


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.workdir = "runs/default"  # folder of all artifacts: a local path, gs:// or s3://

    config.corpus = corpus = ml_collections.ConfigDict()
    corpus.source = "installed_docs"  # "installed_docs", "files" or "hub"
    corpus.packages = ""  # "installed_docs": more installed packages whose documentation is added, separated by commas
    corpus.path = ""  # file or folder (text, JSON, Parquet; plain, gz, zst, bz2, xz) for "files"
    corpus.name = ""  # "hub": Hugging Face data set, NAME or NAME@REVISION; several, separated by commas, are mixed
    corpus.subset = ""  # the data set's configuration, e.g. "wikitext-103-raw-v1"; one entry per name, or one for all
    corpus.text_key = "text"  # field of a row with the text, e.g. "data.text" or "title+text"; entries as for subset
    corpus.group_key = ""  # rows with equal values of this field stay in one split, e.g. "book"; entries as for subset
    corpus.group_part = r"#\d+$"  # regular expression removed from group values: "book#0007" is a part of "book"
    corpus.articles = ""  # "wikitext": text in WikiText's format; documents are articles; entries as for subset
    corpus.split_by_name = False  # "files": split by names of files and folders (train*, valid*, test*), not by hash
    corpus.max_bytes = 0  # a deterministic sample of documents up to this many bytes; 0 = all
    corpus.document_bytes = 8192  # longer text files become documents of about this size, ending at blank lines
    corpus.validation_fraction = 0.05  # fraction of the text, in whole files, articles or groups
    corpus.test_fraction = 0.05  # the same for the test split
    corpus.seed = 0  # of sample and split

    config.tokenizer = tokenizer = ml_collections.ConfigDict()
    # "train" (byte-level BPE on the training split), "file" (tokenizer.json), "gguf" (the model's) or "hub"
    tokenizer.source = "train"
    tokenizer.path = ""  # the file, or the Hugging Face NAME or NAME@REVISION
    tokenizer.end_of_text = ""  # token that ends a document; "" = <|endoftext|>, </s> or similar, or the eos_token
    tokenizer.vocab_size = 4096  # tokens of a trained tokenizer

    config.base = base = ml_collections.ConfigDict()
    base.source = "train"  # "train", "huggingface" or "gguf"
    # Hugging Face folder, or NAME or NAME@REVISION, of a GPT-2, Llama or Mistral; a GGUF file of a Llama or Mistral
    base.path = ""
    # Steps of fine-tuning an imported base on the corpus before keys are computed, with batch and precision from
    # base.training and AdamW at the best of a few small learning rates; 0 = no fine-tuning
    base.finetune_steps = 0
    base.context_length = 256  # positions per sequence, in every stage
    base.width = 64  # width, blocks and heads apply to a base trained here
    base.blocks = 2
    base.heads = 2
    base.training = optimization()

    config.datastore = datastore = ml_collections.ConfigDict()
    datastore.dtype = "float16"  # of keys and memory inputs: "float16" or "bfloat16"
    datastore.compute_dtype = "float32"  # of the forward pass: "float32", or "bfloat16" on accelerators
    datastore.input_depth = 1.0  # relative depth of the memory's input: 1.0 = same as the keys, 0.7 = the paper's best
    datastore.key_model = ""  # Hugging Face model that makes the keys for the targets; "" = the base
    datastore.batch_sequences = 32  # sequences per forward pass, over all devices
    datastore.sequences_per_shard = 256  # sequences per shard

    config.targets = targets = ml_collections.ConfigDict()
    targets.backend = "auto"  # "scann", "exact", or "auto": scann if it is installed
    targets.k = 64  # neighbors per position
    targets.temperature = 0.0  # squared-L2 units; 0 = best validation likelihood of the kNN-LM mixture
    targets.exclude = (
        "self"  # what a query must not retrieve: "self" (the paper), or "document": its file, article or group
    )
    targets.keep = 0  # maximum probabilities kept per position, the largest; 0 = all
    targets.minimum_probability = 1e-8  # smaller probabilities are dropped
    targets.key_shard_rows = 2_000_000  # maximum keys per index; bounds a process's memory (docs/neighbors.md)
    targets.recall = 0.95  # required share of true neighbors; if no search reaches it, the stage stops
    targets.search_dimensions = 0  # principal components in which candidates are searched; 0 = all dimensions
    targets.recall_target = 1.0  # exact backend: 1 = exact selection; less = approximate and faster on TPUs
    targets.leaves = 0  # scann: partitions per index; 0 = from the number of keys
    targets.leaves_to_search = 0  # scann: partitions searched; 0 = as many as reach the recall
    targets.reorder = 0  # scann: candidates scored exactly; 0 = as many as reach the recall
    targets.training_sample = 100_000  # keys on which partitions and projections are trained
    targets.quality_positions = 2048  # training positions on which recall and total variation are measured

    config.memory = memory = ml_collections.ConfigDict()
    memory.family = "gpt2"  # "gpt2" (LayerNorm, GELU) or "llama" (RMSNorm, SwiGLU)
    memory.width = 256
    memory.blocks = 4
    memory.feed_forward_width = 0  # 0 = 4 x width; the paper: the base's
    memory.output_from_base = False  # initialize the output projection from the base LM's (needs the base's width)

    config.training = training = optimization()
    training.mode = "offline"  # memory inputs from the datastore; "online" = the base LM runs in the step
    training.alpha = 0.4  # weight of the KL term (the paper: 0.4); the rest is cross entropy
    training.start = ""  # a finished memory to start from, such as an imported one; "" = random parameters

    config.evaluation = evaluation = ml_collections.ConfigDict()
    evaluation.confidence = 0.95  # confidence level of the intervals
    evaluation.sharpness_positions = 4000  # test positions at which whole distributions are analyzed
    evaluation.seed = 0  # of the choice of these positions

    config.comparison = comparison = ml_collections.ConfigDict()
    # "base", "memory", "knn_lm", "rag", "cpt", "lora", "memory+rag", "cpt+memory"
    comparison.systems = "base,memory,knn_lm,rag,cpt,lora"
    comparison.tasks = "passages"  # names from mlpmem_jax/comparison/tasks/, separated by commas
    comparison.data = "data/evaluation"  # folder of the tasks' files (docs/evaluation.md)
    comparison.hub = False  # whether to download missing files from the Hugging Face hub (extra `hub`)
    comparison.limit = 0  # questions per task, sampled by the seed; 0 = all
    comparison.tuning_questions = 500  # maximum questions of a validation split on which lambda is tuned
    comparison.retriever = "bm25"  # "bm25", or the folder of a sentence encoder
    comparison.passages = 5  # passages per prompt
    comparison.passage_words = 100  # maximum words per passage
    comparison.k = 0  # neighbors of kNN-LM; 0 = targets.k
    comparison.speed = ml_collections.ConfigDict()  # settings of `mlpmem compare --speed`
    comparison.speed.positions = "10000,100000,1000000,10000000"  # sizes of the searched corpora, separated by commas
    comparison.speed.prompt_tokens = 64
    comparison.speed.new_tokens = 16
    comparison.speed.rounds = 3  # the page shows their median
    comparison.seed = 0  # of the sampled questions and the halves on which lambda is tuned

    config.mesh = mesh = ml_collections.ConfigDict()
    mesh.slice = 1  # data parallel over the data-center network
    mesh.fsdp = -1  # fully sharded data parallel; -1 = all remaining devices
    mesh.tensor = 1  # tensor parallel
    # Logical axis -> mesh axes, joined by "+"; "" = none.
    mesh.rules = ml_collections.ConfigDict(
        {"batch": "slice+fsdp", "embed": "fsdp", "mlp": "tensor", "heads": "tensor", "vocab": "tensor"}
    )
    return config
