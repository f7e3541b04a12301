"""Language models from llama.cpp's GGUF files.

Each process dequantizes only the rows of a tensor for its devices, one block at a time, so the host never holds a whole
model in float32.
"""

from __future__ import annotations

import functools

import jax
import numpy as np

from mlpmem_jax.core.errors import UserError
from mlpmem_jax.core.gguf_file import GGUFFile
from mlpmem_jax.core.progress import progress
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.interop import huggingface, tensor_files
from mlpmem_jax.interop.checkpoint_layout import layouts
from mlpmem_jax.models import language_model
from mlpmem_jax.models.llama import LlamaConfig
from mlpmem_jax.models.rotary import Rotary

_ARCHITECTURE = "llama"
_TENSORS = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_TENSORS_OF_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_PERMUTED = ("attn_q", "attn_k")


def load_language_model(path: str, sharding: Sharding) -> tuple[dict, language_model.Config]:
    """Parameters (float32, placed on the mesh, the tree of `language_model.init`) and dimensions of a language model.

    Args:
      path: a GGUF file of llama.cpp's architecture `llama`: Llama 1 to 3, Mistral, SmolLM2 and the like.

    Raises:
      UserError: the file does not exist, has another architecture or quantization, or a tensor is missing, unexpected,
        not finite, or of another shape than in the metadata; names the tensor.
    """
    file = GGUFFile(path)
    config = read_config(file)
    abstract = language_model.abstract_parameters(config)
    stored = layouts("llama", abstract, config.blocks)
    _check_tensors(file, jax.tree.leaves(stored))
    placed = sharding.tree(language_model.logical_axes(config), abstract)
    count = sum(len(layout.names) for layout in jax.tree.leaves(stored))
    read = functools.partial(_read, file, config.head_width)
    with progress(count, f"importing {path}", "tensors") as bar:
        return jax.tree.map(functools.partial(huggingface.place, read, bar), stored, placed), config


def read_config(file: GGUFFile) -> LlamaConfig:
    """Dimensions of the file's model.

    Raises:
      UserError: the architecture or one of its options is not implemented.
    """
    architecture = file.value("general.architecture")
    if architecture != _ARCHITECTURE:
        raise UserError(f"{file.path}: general.architecture is {architecture!r}; only 'llama' can be imported")
    if file.value("llama.expert_count", 0):
        raise UserError(f"{file.path}: llama.expert_count is not 0; mixtures of experts cannot be imported")
    if (parts := file.value("split.count", 1)) not in (0, 1):
        raise UserError(
            f"{file.path}: is one of {parts} parts of a model; join them with llama.cpp's `llama-gguf-split --merge`"
        )
    scaling = file.value("llama.rope.scaling.type", "linear")  # llama.cpp's default
    if scaling not in ("none", "linear") or "rope_freqs.weight" in file.tensors:
        kind = "rope_freqs.weight" if scaling in ("none", "linear") else scaling
        raise UserError(
            f"{file.path}: rotary embeddings are scaled by {kind!r}, which only Hugging Face folders support; "
            "set config.base.source to 'huggingface'"
        )
    width, heads = file.number("llama.embedding_length"), file.number("llama.attention.head_count")
    key_value_heads = file.number("llama.attention.head_count_kv", heads)
    head_width = file.number("llama.attention.key_length", width // heads)
    if heads % key_value_heads or head_width % 2:
        raise UserError(
            f"{file.path}: llama.attention.head_count_kv, {key_value_heads}, does not divide head_count, {heads}, "
            f"or the width of a head, {head_width}, is odd"
        )
    if file.number("llama.rope.dimension_count", head_width) != head_width:
        raise UserError(f"{file.path}: llama.rope.dimension_count is not the width of a head, {head_width}")
    rotary = {"type": "default"}
    factors = [name for name in ("llama.rope.scaling.factor", "llama.rope.scale_linear") if file.values.get(name)]
    if scaling == "linear" and factors:  # the second is the old name; 0 is none
        rotary = {"type": "linear", "factor": file.number(factors[0], kind=float)}
    return LlamaConfig(
        vocab_size=file.shape("token_embd.weight")[0] if "token_embd.weight" in file.tensors else 0,
        context_length=file.number("llama.context_length"),
        width=width,
        blocks=file.number("llama.block_count"),
        heads=heads,
        key_value_heads=key_value_heads,
        head_width=head_width,
        feed_forward_width=file.number("llama.feed_forward_length"),
        norm_epsilon=file.number("llama.attention.layer_norm_rms_epsilon", kind=float),
        sliding_window=0,
        tied="output.weight" not in file.tensors,
        rotary=Rotary(theta=file.number("llama.rope.freq_base", 10_000.0, float), **rotary),
        family="llama",
    )


def _stored_name(name: str) -> str:
    """llama.cpp's name of a tensor of a Hugging Face checkpoint."""
    if name in _TENSORS:
        return _TENSORS[name]
    _, block, rest = name.split(".", 2)
    return f"blk.{block}.{_TENSORS_OF_BLOCK[rest.removesuffix('.weight')]}.weight"


def _check_tensors(file: GGUFFile, stored) -> None:
    expected = {_stored_name(name): layout.tensor_shape for layout in stored for name in layout.names}
    for name, shape in expected.items():
        if name not in file.tensors:
            raise UserError(f"{file.path}: tensor {name!r} of shape {shape} is missing; the file is not complete")
        if file.shape(name) != shape:
            raise UserError(f"{file.path}: tensor {name!r} is {file.shape(name)}; the metadata say {shape}")
    if extra := sorted(file.tensors.keys() - expected.keys()):
        raise UserError(f"{file.path}: tensor {extra[0]!r} is not part of the model that the metadata describe")


def _read(file: GGUFFile, head_width: int, name: str, part: tuple[slice, ...]) -> np.ndarray:
    """A part of a tensor in Hugging Face's order; for queries and keys, whole heads."""
    stored = _stored_name(name)
    values = tensor_files.finite(file.read(stored, part), file.path, stored)
    if stored.split(".")[-2] in _PERMUTED:
        # llama.cpp rotates pairs of adjacent numbers, Hugging Face the two halves of a head.
        values = values.reshape(-1, head_width // 2, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
    return values
