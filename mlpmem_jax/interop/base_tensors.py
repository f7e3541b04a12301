"""The base LM as PyTorch has it: names and shapes of its tensors, and its config."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from mlpmem_jax.core import mesh as meshes
from mlpmem_jax.interop import huggingface
from mlpmem_jax.interop.memory_tensors import on_host
from mlpmem_jax.interop.tensor_files import Tensor
from mlpmem_jax.models import gpt2
from mlpmem_jax.models.gpt2 import GPT2Config


def _rows(config: GPT2Config):
    abstract = jax.eval_shape(functools.partial(gpt2.init, config), jax.random.key(0))
    for path, array in jax.tree_util.tree_leaves_with_path(abstract):
        shape = array.shape[1:] if path[0].key == "h" else array.shape
        for block, name in enumerate(huggingface._names(path, config)):
            yield path, block, f"transformer.{name}", huggingface._tensor_shape(name, shape)


def shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    return {name: shape for _, _, name, shape in _rows(config)}


def tensors(parameters: dict, config: GPT2Config) -> list[Tensor]:
    found = []
    for path, block, name, shape in _rows(config):
        array = functools.reduce(lambda tree, entry: tree[entry.key], path, parameters)
        stacked = path[0].key == "h"

        def values(array=array, block=block, shape=shape, stacked=stacked) -> np.ndarray:
            return on_host(array[block] if stacked else array).reshape(shape)

        found.append(Tensor(name, shape, values))
    return found


def load(found: Mapping[str, Tensor], config: GPT2Config, mesh: Mesh, rules: meshes.Rules) -> dict:
    def array(path, abstract, sharding):
        names = [f"transformer.{name}" for name in huggingface._names(path, config)]

        def part(index):
            if path[0].key != "h":
                return found[names[0]].read().reshape(abstract.shape)[index]
            return np.stack([found[n].read().reshape(abstract.shape[1:])[index[1:]] for n in names[index[0]]])

        return jax.make_array_from_callback(abstract.shape, sharding, part)

    abstract = jax.eval_shape(functools.partial(gpt2.init, config), jax.random.key(0))
    placed = meshes.shardings(mesh, gpt2.logical_axes(config), rules)
    return jax.tree_util.tree_map_with_path(array, abstract, placed)


def to_json(config: GPT2Config) -> dict:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_embd": config.width,
        "n_layer": config.blocks,
        "n_head": config.heads,
        "layer_norm_epsilon": config.norm_epsilon,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
    }


def from_json(values, source) -> GPT2Config:
    import json, pathlib, tempfile
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(values))
        return huggingface.read_config(pathlib.Path(folder))
