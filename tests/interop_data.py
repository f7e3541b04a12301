"""Small working directories with a base and a memory of random weights, for the tests of interop."""

import dataclasses
import functools

import jax
import ml_collections
import numpy as np
import pyarrow as pa
import tokenizers
from etils import epath
from tokenizers import models as tokenizer_models
from tokenizers import pre_tokenizers, processors

from configs import default
from mlpmem_jax.core.artifacts import ArraySpec, ArtifactWriter, open_artifact
from mlpmem_jax.models import gpt2, language_model, llama, memory, rotary, saved

VOCABULARY, LENGTH, WIDTH, WEIGHT = 61, 96, 16, 0.3
INPUT_BLOCK = 1
GPT2 = gpt2.GPT2Config(VOCABULARY, LENGTH, WIDTH, 2, 2)
LLAMA = llama.LlamaConfig(
    vocab_size=VOCABULARY,
    context_length=LENGTH,
    width=WIDTH,
    blocks=2,
    heads=4,
    key_value_heads=2,
    head_width=6,
    feed_forward_width=24,
    norm_epsilon=1e-6,
    rotary=rotary.Rotary("default", 100.0),
    family="llama",
)
MISTRAL = dataclasses.replace(LLAMA, sliding_window=20, family="mistral")
MODELS = {  # base and memory
    "gpt2": (GPT2, memory.MemoryConfig("gpt2", VOCABULARY, 128, WIDTH, WIDTH, 2, 4 * WIDTH)),
    "gpt2-projected": (GPT2, memory.MemoryConfig("gpt2", VOCABULARY, 128, WIDTH, 24, 2, 96)),
    "llama-projected": (LLAMA, memory.MemoryConfig("llama", VOCABULARY, 128, WIDTH, 24, 2, 40, 1e-6, "silu")),
    "mistral": (MISTRAL, memory.MemoryConfig("llama", VOCABULARY, 128, WIDTH, WIDTH, 2, 40, 1e-5, "silu")),
}
LISTS = [("token_id", pa.list_(pa.int32())), ("prob", pa.list_(pa.float16()))]
TARGETS = pa.schema([("id_cnt", pa.int32()), *LISTS, ("label", pa.int32())])


def noisy(parameters, seed):
    """Fresh parameters with noise: zero biases and unit scales would hide mistakes."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda array: array + 0.3 * random.normal(size=array.shape).astype(np.float32), parameters)


def write_tokens(workdir, vocabulary=VOCABULARY, dtype="uint16", begin=False):
    """Random tokens of all splits, and a tokenizer of words w1, w2 ...; returns the tokens of each split.

    Where it has a `begin`, the tokenizer puts <s>, which is in the place of w1, before a text.
    """
    names = ["<|endoftext|>", "<s>" if begin else "w1", *(f"w{number}" for number in range(2, vocabulary))]
    words = {name: place for place, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(tokenizer_models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    random, streams, specs = np.random.default_rng(7), {}, {}
    for split, count in (("train", 900), ("validation", 400), ("test", 300)):
        streams[split] = random.integers(0, vocabulary, count)
        specs[split] = ArraySpec((1, count), dtype, 1, (1, count))
        specs[f"{split}_lengths"] = ArraySpec((1, 8), "uint32", 1, (1, 8))
    writer = ArtifactWriter.create(workdir / "tokens", "tokens", {}, {}, specs)
    writer.write_file("tokenizer.json", tokenizer.to_str().encode())
    lengths = {f"{split}_lengths": [[len(tokens)]] for split, tokens in streams.items()}
    writer.write_shard(0, {**{split: tokens[None] for split, tokens in streams.items()}, **lengths})
    writer.seal({"vocab_size": vocabulary, "end_of_text_id": 0}, files=("tokenizer.json",))
    return streams


def write_base(workdir, model=GPT2, seed=0):
    parameters = noisy(jax.jit(language_model.init, static_argnums=0)(model, jax.random.key(seed)), seed)
    tokens = open_artifact(workdir / "tokens", "tokens")
    writer = ArtifactWriter.create(workdir / "base", "base", {"made": "here"}, {"tokens": tokens.fingerprint}, {})
    return parameters, saved.seal(writer, model, parameters, {})


def write_memory(workdir, base, model, seed=1, input_block=INPUT_BLOCK):
    parameters = noisy(jax.jit(memory.init, static_argnums=0)(model, jax.random.key(seed)), seed)
    kernel = parameters["lm_head"]["kernel"]
    parameters["lm_head"]["kernel"] = kernel.at[:, VOCABULARY:].set(0)  # padding, which no export holds
    writer = ArtifactWriter.create(workdir / "memory", "memory", {"made": "here"}, {"base": base.fingerprint}, {})
    saved.seal(
        writer,
        model,
        parameters,
        {"validation": {"interpolation_weight": WEIGHT}, "step": 7, "input_block": input_block},
    )
    return parameters


def config_for(workdir, **overrides):
    config = default.get_config()
    config.workdir = str(workdir)
    config.base.context_length = LENGTH
    config.datastore.input_depth = INPUT_BLOCK / GPT2.blocks
    config.datastore.sequences_per_shard = 2
    for key, value in overrides.items():
        config.update_from_flattened_dict({key.replace("__", "."): value})
    return config


@dataclasses.dataclass
class Workdir:
    """What lies in a working directory: the config, dimensions of base and memory, and their parameters."""

    config: ml_collections.ConfigDict
    base_model: language_model.Config
    model: memory.MemoryConfig
    base: dict
    memory: dict

    def log_mixture(self, tokens_BxT, weight):
        """log(weight p_memory + (1 - weight) p_base) at every position, float64 [B, T, V], mixed outside JAX."""
        padded = np.zeros((len(tokens_BxT), 24), np.int32)  # later tokens are not seen, and one length compiles once
        padded[:, : tokens_BxT.shape[1]] = tokens_BxT
        both = _logits(self.base_model, self.model, self.base, self.memory, padded)
        p_base, p_memory = (np.exp(x - x.max(-1, keepdims=True)) for x in np.asarray(both, np.float64))
        p_base, p_memory = p_base / p_base.sum(-1, keepdims=True), p_memory / p_memory.sum(-1, keepdims=True)
        return np.log(weight * p_memory + (1 - weight) * p_base)[:, : tokens_BxT.shape[1]]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(base_model, model, base, memory_parameters, tokens_BxT):
    _, block_inputs = language_model.features(base, base_model, tokens_BxT, input_blocks=(INPUT_BLOCK,))
    memory_logits = memory.logits(memory_parameters, model, block_inputs[INPUT_BLOCK])[..., :VOCABULARY]
    return language_model.logits(base, base_model, tokens_BxT), memory_logits


def write_stream(file, schema, columns, rows_per_batch=250):
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        table = pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
        for batch in table.to_batches(max_chunksize=rows_per_batch):
            writer.write_batch(batch)
    return str(file)


def target_columns(labels, seed=0):
    """Random distributions in the reference's form; one position in ten has no neighbors."""
    random = np.random.default_rng(seed)
    columns = {"id_cnt": [], "token_id": [], "prob": [], "label": [int(label) for label in labels]}
    for row, label in enumerate(labels):
        count = 0 if row % 10 == 3 else int(random.integers(1, 9))
        ids = random.choice(VOCABULARY, count, replace=False)
        ids[:1] = label if label not in ids else ids[:1]
        weights = np.sort(random.random(count))[::-1] + 0.01
        columns["id_cnt"].append(count)
        columns["token_id"].append([int(token) for token in ids])
        columns["prob"].append(list((weights / weights.sum()).astype(np.float16)) if count else [])
    return columns


def keys_of(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float16)


def datastore_stream(file, vals, keys=None, width=WIDTH):
    keys = keys_of(len(vals)) if keys is None else keys
    schema = pa.schema([("keys", pa.list_(pa.float16(), width)), ("vals", pa.int32())])
    return write_stream(file, schema, {"keys": list(keys), "vals": vals})


def write_workdir(folder, base_model, model, input_block=INPUT_BLOCK, begin=False):
    workdir = epath.Path(folder)
    write_tokens(workdir, begin=begin)
    base, artifact = write_base(workdir, base_model)
    memory_parameters = write_memory(workdir, artifact, model, input_block=input_block)
    return Workdir(config_for(workdir), base_model, model, base, memory_parameters)
