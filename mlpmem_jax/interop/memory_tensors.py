"""The memory in PyTorch: names, shapes and orientation of its tensors, and its config.

Names are those of the reference implementation's memory classes (arXiv 2508.01832). GPT-2's projections are Conv1D,
which stores [in, out] as we do; every other matrix is a Linear's [out, in].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import jax
import numpy as np

from mlpmem_jax.core.errors import UserError
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.interop.tensor_files import Tensor, on_host
from mlpmem_jax.models import memory
from mlpmem_jax.models.layers import ACTIVATIONS
from mlpmem_jax.models.memory import MemoryConfig

_NAMES = {
    "gpt2": {"h": "h", "norm": "ln_1", "final_norm": "ln_f"},
    "llama": {"h": "layers", "norm": "input_layernorm", "final_norm": "norm"},
}
_KEYS = {
    "gpt2": ("vocab_size", "n_embd", "n_layer", "n_inner", "layer_norm_epsilon", "activation_function"),
    "llama": ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "rms_norm_eps", "hidden_act"),
}
_EPSILON = {"gpt2": 1e-5, "llama": 1e-6}  # transformers' defaults
_OTHER_NAMES = {"gelu_pytorch_tanh": "gelu_new", "swish": "silu"}
FAMILIES = {"gpt2": "gpt2", "llama": "llama", "mistral": "llama"}
"""Model type in config.json -> our family."""


def _name(path: tuple, family: str) -> str:
    """The PyTorch name of one of our arrays, with '{}' for the number of a block."""
    *modules, leaf = (entry.key for entry in path)
    parts = [_NAMES[family].get(module, module) for module in modules]
    if modules[0] == "h":
        parts.insert(1, "{}")
    return ".".join([*parts, "bias" if leaf == "bias" else "weight"])


def _is_linear(path: tuple, family: str) -> bool:
    return path[-1].key == "kernel" and not (family == "gpt2" and path[0].key == "h")


def _tensor_shape(path: tuple, shape: tuple[int, ...], config: MemoryConfig) -> tuple[int, ...]:
    """Shape in PyTorch of one of our arrays, without the axis of blocks and the padding of the vocabulary."""
    if path[0].key == "lm_head":
        return config.vocab_size, config.width
    shape = shape[1:] if path[0].key == "h" else shape
    return shape[::-1] if _is_linear(path, config.family) else shape


def shapes(config: MemoryConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the PyTorch module."""
    expected = {}
    for path, array in jax.tree_util.tree_leaves_with_path(memory.abstract_parameters(config)):
        name = _name(path, config.family)
        blocks = range(config.blocks) if path[0].key == "h" else (0,)
        expected |= {name.format(block): _tensor_shape(path, array.shape, config) for block in blocks}
    return expected


def tensors(parameters: dict, config: MemoryConfig) -> list[Tensor]:
    """The memory's parameters as PyTorch tensors; each is fetched from the devices when it is read."""
    result = []
    for path, array in jax.tree_util.tree_leaves_with_path(parameters):
        shape = _tensor_shape(path, array.shape, config)
        name, is_linear = _name(path, config.family), _is_linear(path, config.family)

        def values(block=None, array=array, shape=shape, is_linear=is_linear) -> np.ndarray:
            part = on_host(array if block is None else array[block])
            return part.T[: shape[0]] if is_linear else part

        if path[0].key == "h":
            numbers = range(config.blocks)
            result += [Tensor(name.format(block), shape, functools.partial(values, block)) for block in numbers]
        else:
            result.append(Tensor(name, shape, values))
    return result


def load(tensors_by_name: Mapping[str, Tensor], config: MemoryConfig, sharding: Sharding) -> dict:
    """Parameters on the mesh, the tree of `memory.init`, from tensors that passed `tensor_files.check`."""

    def array(path, abstract, sharding) -> jax.Array:
        name, is_linear = _name(path, config.family), _is_linear(path, config.family)

        def whole(block: int) -> np.ndarray:
            values = tensors_by_name[name.format(block)].read()
            values = values.T if is_linear else values
            if path[0].key == "lm_head":
                values = np.pad(values, ((0, 0), (0, config.padded_vocab_size - config.vocab_size)))
            return values

        def part(index: tuple[slice, ...]) -> np.ndarray:
            if path[0].key != "h":
                return whole(0)[index]
            return np.stack([whole(block)[index[1:]] for block in range(config.blocks)[index[0]]])

        return jax.make_array_from_callback(abstract.shape, sharding, part)

    placed = sharding.tree(memory.logical_axes(config))
    return jax.tree_util.tree_map_with_path(array, memory.abstract_parameters(config), placed)


def to_json(config: MemoryConfig, base: Mapping) -> dict:
    """The config.json of a memory: the base LM's with the memory's sizes in it.

    Args:
      config: dimensions of the memory.
      base: the base LM's config.json.
    """
    sizes = config.vocab_size, config.width, config.blocks, config.feed_forward_width
    values = dict(zip(_KEYS[config.family], (*sizes, config.norm_epsilon, config.activation), strict=True))
    heads = base.get("n_head") or base["num_attention_heads"]
    heads = math.gcd(heads, config.width)  # unused by a memory, but transformers divides by them
    positions = base.get("n_positions") or base["max_position_embeddings"]
    if config.family == "gpt2":
        values |= {"model_type": "gpt2", "n_head": heads, "n_positions": positions, "resid_pdrop": 0.0}
    else:
        model_type = base["model_type"] if FAMILIES[base["model_type"]] == "llama" else "llama"
        values |= {"model_type": model_type, "num_attention_heads": heads, "num_key_value_heads": heads}
        values |= {"max_position_embeddings": positions, "mlp_bias": False}
    no_tokens = {"bos_token_id": None, "eos_token_id": None}  # the defaults may be outside the vocabulary
    return {**values, **no_tokens, "tie_word_embeddings": False, "dtype": "float32"}


def from_json(values: Mapping, input_width: int, vocabulary_multiple: int, source: str) -> MemoryConfig:
    """Dimensions of the memory that a config.json describes.

    Args:
      values: values of the config.json.
      input_width: width of the memory's input.
      vocabulary_multiple: the padded vocabulary must be a multiple of this.
      source: source of the values, for errors.

    Raises:
      UserError: a value is missing or not implemented.
    """
    family = FAMILIES.get(values.get("model_type"))
    if family is None:
        raise UserError(
            f"{source}: model_type is {values.get('model_type')!r}; expected a memory of {', '.join(FAMILIES)}"
        )
    if values.get("mlp_bias"):
        raise UserError(f"{source}: mlp_bias is {values['mlp_bias']!r}; only a memory without biases can be imported")
    vocab_size, width, blocks, feed_forward, epsilon, activation = (values.get(key) for key in _KEYS[family])
    if family == "gpt2" and width and feed_forward is None:
        feed_forward = 4 * width
    for key, value in zip(_KEYS[family], (vocab_size, width, blocks, feed_forward), strict=False):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{source}: {key} is {value!r}; expected a whole number, 1 or more")
    activation = activation or ("gelu_new" if family == "gpt2" else "silu")
    activation = _OTHER_NAMES.get(activation, activation)
    if activation not in ACTIVATIONS:
        raise UserError(f"{source}: {_KEYS[family][-1]} is {activation!r}; expected one of {sorted(ACTIVATIONS)}")
    return MemoryConfig(
        family=family,
        vocab_size=vocab_size,
        padded_vocab_size=-(-vocab_size // vocabulary_multiple) * vocabulary_multiple,
        input_width=input_width,
        width=width,
        blocks=blocks,
        feed_forward_width=feed_forward,
        norm_epsilon=_EPSILON[family] if epsilon is None else epsilon,
        activation=activation,
    )
