"""Small working directories with a base and a memory of random weights, for the tests of interop."""

import dataclasses

import jax
import numpy as np
import tokenizers
from etils import epath
from tokenizers import models as tokenizer_models
from tokenizers import pre_tokenizers

from configs import default
from mlpmem_jax.core.artifacts import ArraySpec, ArtifactWriter, open_artifact
from mlpmem_jax.models import gpt2, memory, saved

VOCABULARY, LENGTH, WIDTH, WEIGHT = 61, 96, 16, 0.3
BASE = gpt2.GPT2Config(VOCABULARY, LENGTH, WIDTH, 3, 2)
INPUT_BLOCK = 2
MEMORIES = {
    "gpt2": memory.MemoryConfig("gpt2", VOCABULARY, 128, WIDTH, WIDTH, 2, 4 * WIDTH),
    "gpt2-projected": memory.MemoryConfig("gpt2", VOCABULARY, 128, WIDTH, 24, 2, 96),
    "llama": memory.MemoryConfig("llama", VOCABULARY, 128, WIDTH, WIDTH, 2, 40, 1e-6, "silu"),
    "llama-projected": memory.MemoryConfig("llama", VOCABULARY, 128, WIDTH, 24, 2, 40, 1e-6, "silu"),
}


def noisy(parameters, seed):
    """Fresh parameters with noise: zero biases and unit scales would hide mistakes."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda array: array + 0.3 * random.normal(size=array.shape).astype(np.float32), parameters)


def write_tokens(workdir, vocabulary=VOCABULARY, dtype="uint16"):
    """Random tokens of all splits, and a tokenizer of words w1, w2 ...; returns the tokens of each split."""
    words = {"<|endoftext|>": 0, **{f"w{number}": number for number in range(1, vocabulary)}}
    tokenizer = tokenizers.Tokenizer(tokenizer_models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<|endoftext|>"])
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


def write_base(workdir, model=BASE, seed=0):
    parameters = noisy(gpt2.init(model, jax.random.key(seed)), seed)
    tokens = open_artifact(workdir / "tokens", "tokens")
    writer = ArtifactWriter.create(workdir / "base", "base", {"made": "here"}, {"tokens": tokens.fingerprint}, {})
    return parameters, saved.seal(writer, model, parameters, {})


def write_memory(workdir, base, model, seed=1):
    parameters = noisy(memory.init(model, jax.random.key(seed)), seed)
    writer = ArtifactWriter.create(workdir / "memory", "memory", {"made": "here"}, {"base": base.fingerprint}, {})
    saved.seal(writer, model, parameters, {"validation": {"interpolation_weight": WEIGHT}, "step": 7})
    return parameters


def config_for(workdir, **overrides):
    config = default.get_config()
    config.workdir = str(workdir)
    config.base.context_length = LENGTH
    config.datastore.input_depth = INPUT_BLOCK / BASE.blocks
    config.datastore.sequences_per_shard = 2
    for key, value in overrides.items():
        config.update_from_flattened_dict({key.replace("__", "."): value})
    return config


@dataclasses.dataclass
class Workdir:
    config: object
    model: memory.MemoryConfig
    base: dict
    memory: dict


def write_workdir(folder, model):
    workdir = epath.Path(folder)
    write_tokens(workdir)
    base, artifact = write_base(workdir)
    return Workdir(config_for(workdir), model, base, write_memory(workdir, artifact, model))
