"""GPT-2 weights and dimensions from a Hugging Face folder or hub name.

Weights are safetensors, in one file or sharded with an index. Each process reads the tensors that its devices hold,
one block's at a time.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib

import jax
import numpy as np
import safetensors
from jax.sharding import Mesh

from mlpmem_jax.core import mesh as meshes
from mlpmem_jax.core.errors import UserError, require
from mlpmem_jax.models import gpt2
from mlpmem_jax.models.gpt2 import GPT2Config

# What a config may leave out, and the values that models/gpt2.py implements.
_IMPLEMENTED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
_DIMENSIONS = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
_INDEX = "model.safetensors.index.json"


def load_gpt2(source: str, mesh: Mesh, rules: meshes.Rules = meshes.RULES) -> tuple[dict, GPT2Config]:
    """Parameters (float32, placed on the mesh, the tree of `gpt2.init`) and dimensions of a GPT-2.

    Args:
      source: a folder with config.json and safetensors weights, or the name of a model on the Hugging Face hub.

    Raises:
      UserError: no such folder or model, another architecture, or a tensor that is missing, left over, of another
        shape than the config says, or unreadable; the text names it.
    """
    folder = _folder(source)
    config = read_config(folder)
    files = _files_of_tensors(folder)
    abstract = jax.eval_shape(functools.partial(gpt2.init, config), jax.random.key(0))
    _check_tensors(folder, files, config, abstract)
    placed = meshes.shardings(mesh, gpt2.logical_axes(config), rules)
    parameters = jax.tree_util.tree_map_with_path(
        lambda path, array, sharding: _array(files, _names(path, config), array.shape, sharding), abstract, placed
    )
    return parameters, config


def read_config(folder: pathlib.Path) -> GPT2Config:
    """Dimensions of the GPT-2 that the folder's config.json describes.

    Raises:
      UserError: the file is missing, unreadable, or describes what this package does not implement.
    """
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: expected the config of a Hugging Face model: {error}") from error
    for key, allowed in _IMPLEMENTED.items():
        if values.get(key, allowed[0]) not in allowed:
            raise UserError(f"{file}: {key} is {values[key]!r}; only {' or '.join(map(repr, allowed))} can be imported")
    missing = [key for key in _DIMENSIONS if not isinstance(values.get(key), int)]
    if missing:
        raise UserError(f"{file}: {missing[0]} is missing or no whole number; this is no config of a GPT-2")
    if values["n_embd"] % values["n_head"]:
        raise UserError(f"{file}: n_head, {values['n_head']}, does not divide n_embd, {values['n_embd']}")
    if (values.get("n_inner") or 4 * values["n_embd"]) != 4 * values["n_embd"]:
        raise UserError(f"{file}: n_inner is {values['n_inner']}; only 4 x n_embd can be imported")
    vocab_size, context_length, width, blocks, heads = (values[key] for key in _DIMENSIONS)
    return GPT2Config(vocab_size, context_length, width, blocks, heads, values.get("layer_norm_epsilon", 1e-5))


def _folder(source: str) -> pathlib.Path:
    """The folder itself, or that of a downloaded hub model."""
    folder = pathlib.Path(source)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or source.startswith(".") or source.count("/") > 1:
        raise UserError(f"{source}: no such folder; expected one with config.json and model.safetensors")
    hub = require("huggingface_hub", extra="hub")
    try:
        return pathlib.Path(hub.snapshot_download(source, allow_patterns=["config.json", "model*.safetensors*"]))
    except Exception as error:  # the hub's client raises errors of several libraries
        raise UserError(f"{source}: neither a folder nor a model that the Hugging Face hub gave: {error}") from error


def _files_of_tensors(folder: pathlib.Path) -> dict[str, tuple[pathlib.Path, str]]:
    """Tensor name without the 'transformer.' prefix -> (file, name in the file)."""
    try:
        if (folder / _INDEX).is_file():
            shards = set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        else:
            shards = {"model.safetensors"}
        found = {}
        for shard in sorted(shards):
            with safetensors.safe_open(folder / shard, framework="numpy") as file:
                names = file.keys()
                found |= {name.removeprefix("transformer."): (folder / shard, name) for name in names}
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{folder}: expected weights in model.safetensors, or in the files of {_INDEX}, and could not read them: "
            f"{error}"
        ) from error
    # Causal masks that old files carry beside the weights.
    return {name: at for name, at in found.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}


def _names(path: tuple, config: GPT2Config) -> list[str]:
    """Names of the tensors that make up one of our arrays: one, or one for each block."""
    *module, leaf = (entry.key for entry in path)
    name = ".".join([*module, "bias" if leaf == "bias" else "weight"])
    if module[0] != "h":
        return [name]
    return [f"h.{block}.{name.removeprefix('h.')}" for block in range(config.blocks)]


def _tensor_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the tensor in the file (Conv1D keeps [in, out]); ours has an axis for heads."""
    if name.endswith("attn.c_attn.weight"):
        return shape[0], math.prod(shape[1:])
    if name.endswith("attn.c_attn.bias"):
        return (math.prod(shape),)
    if name.endswith("attn.c_proj.weight"):
        return math.prod(shape[:-1]), shape[-1]
    return shape


def _check_tensors(folder: pathlib.Path, files: dict, config: GPT2Config, abstract: dict) -> None:
    """Refuses tensors that are missing, left over or of another shape, and an output projection of its own."""
    expected = {}
    for path, array in jax.tree_util.tree_leaves_with_path(abstract):
        names = _names(path, config)
        shape = array.shape[1:] if path[0].key == "h" else array.shape
        expected |= {name: _tensor_shape(name, shape) for name in names}
    for name, shape in expected.items():
        if name not in files:
            raise UserError(f"{folder}: tensor {name!r} of shape {shape} is missing; config.json and weights disagree")
        file, stored_name = files[name]
        with safetensors.safe_open(file, framework="numpy") as opened:
            found = tuple(opened.get_slice(stored_name).get_shape())
        if found != shape:
            raise UserError(f"{file}: tensor {stored_name!r} is {found}; config.json says {shape}")
    extra = sorted(files.keys() - expected.keys() - {"lm_head.weight"})
    if extra:
        raise UserError(f"{files[extra[0]][0]}: tensor {extra[0]!r} belongs to no GPT-2 of this config.json")
    if "lm_head.weight" in files and not np.array_equal(_tensor(files, "lm_head.weight"), _tensor(files, "wte.weight")):
        raise UserError(
            f"{files['lm_head.weight'][0]}: tensor 'lm_head.weight' differs from 'wte.weight'; only a GPT-2 whose "
            "output projection is its token embedding can be imported"
        )


def _tensor(files: dict, name: str) -> np.ndarray:
    file, stored_name = files[name]
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            return opened.get_tensor(stored_name).astype(np.float32)
    except (OSError, ValueError, TypeError, safetensors.SafetensorError) as error:
        raise UserError(f"{file}: tensor {stored_name!r} could not be read: {error}") from error


def _array(files: dict, names: list[str], shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> jax.Array:
    """A sharded array from the tensors of all blocks, or from one tensor."""
    stacked = names[0].startswith("h.")

    def part(index: tuple[slice, ...]) -> np.ndarray:
        if not stacked:
            return _tensor(files, names[0])[index]
        return np.stack([_tensor(files, name).reshape(shape[1:])[index[1:]] for name in names[index[0]]])

    return jax.make_array_from_callback(shape, sharding, part)
