"""Imports language models from Hugging Face folders, and exports them as such folders.

Each process reads only the parts for its devices, one block's part of one tensor at a time, so the host never holds a
whole model.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mlpmem_jax.core.errors import UserError
from mlpmem_jax.core.mesh import barrier
from mlpmem_jax.core.progress import progress
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.interop import huggingface_config, tensor_files
from mlpmem_jax.interop.checkpoint_layout import Layout, full_name, layouts
from mlpmem_jax.interop.tensor_files import MAXIMUM_SHARD_BYTES, Tensor
from mlpmem_jax.models import language_model

_DTYPES = ("F64", "F32", "F16", "BF16")
_OUTPUT = "lm_head.weight"
_COMPARED_ROWS = 1024
# Tensors in old files that are not weights: GPT-2's causal masks, frequencies and tables of rotary embeddings.
_BUFFERS = (
    ".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached"
)  # fmt: skip

Files = dict[str, Tensor]
"""Tensors by name, without prefix."""


def load_language_model(
    source: str | pathlib.Path, sharding: Sharding, *, part: str = ""
) -> tuple[dict, language_model.Config]:
    """Parameters (float32, placed on the mesh, the tree of `language_model.init`) and dimensions of a language model.

    Args:
      source: a folder with config.json and weights of a GPT-2, Llama or Mistral.
      part: if the language model is a part of a larger model, the name of that part: its tensors begin with it, and
        its config is `<part>_config` in the folder's config.json.

    Raises:
      UserError: the folder does not exist, has another architecture, or a tensor is missing, unexpected, of another
        shape than in the config, not finite, or unreadable; names the tensor.
    """
    folder = pathlib.Path(source)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one with config.json and {tensor_files.SAFETENSORS}")
    config = huggingface_config.read_config(folder, part)
    family = language_model.family(config)
    files = _files_of_tensors(folder, f"{part}." if part else "", language_model.checkpoint(family).prefix)
    abstract = language_model.abstract_parameters(config)
    stored = layouts(family, abstract, config.blocks)
    _check_tensors(folder, files, jax.tree.leaves(stored), has_output="lm_head" in abstract)
    placed = sharding.tree(language_model.logical_axes(config), abstract)
    count = sum(len(layout.names) for layout in jax.tree.leaves(stored))
    with progress(count, f"importing {source}", "tensors") as bar:
        return jax.tree.map(functools.partial(place, functools.partial(_read, files), bar), stored, placed), config


def _files_of_tensors(folder: pathlib.Path, part: str, prefix: str) -> Files:
    return {
        name.removeprefix(part).removeprefix(prefix): tensor
        for name, tensor in tensor_files.read(folder).items()
        if name.startswith(part) and not name.endswith(_BUFFERS)
    }


def _check_tensors(folder: pathlib.Path, files: Files, stored: list[Layout], has_output: bool) -> None:
    """Refuses tensors that are missing, unexpected, of another shape or dtype, and outputs that are wrongly tied."""
    expected = {name: layout.tensor_shape for layout in stored for name in layout.names}
    for name, shape in expected.items():
        if name not in files:
            raise UserError(f"{folder}: tensor {name!r} of shape {shape} is missing; config.json and weights disagree")
        tensor = files[name]
        if tensor.shape != shape:
            raise UserError(f"{tensor.file}: tensor {tensor.name!r} is {tensor.shape}; config.json says {shape}")
        if tensor.dtype not in _DTYPES:
            raise UserError(
                f"{tensor.file}: tensor {tensor.name!r} is stored as {tensor.dtype}; expected {' or '.join(_DTYPES)}"
            )
    extra = sorted(files.keys() - expected.keys() - {_OUTPUT})
    if extra:
        raise UserError(
            f"{files[extra[0]].file}: tensor {extra[0]!r} is not part of the model that config.json describes"
        )
    if _OUTPUT in files and not has_output:
        _check_tied(files, next(name for name in expected if name in ("wte.weight", "embed_tokens.weight")))


def _check_tied(files: Files, embedding: str) -> None:
    shape = files[embedding].shape
    parts = [
        (slice(first, min(first + _COMPARED_ROWS, shape[0])), slice(0, shape[1]))
        for first in range(0, shape[0], _COMPARED_ROWS)
    ]
    if files[_OUTPUT].shape != shape or not all(
        np.array_equal(_read(files, _OUTPUT, part), _read(files, embedding, part)) for part in parts
    ):
        raise UserError(
            f"{files[_OUTPUT].file}: tensor {_OUTPUT!r} differs from {embedding!r}, but config.json says that the "
            "output projection is the token embedding (tie_word_embeddings)"
        )


def _read(files: Files, name: str, part: tuple[slice, ...]) -> np.ndarray:
    """A part of a tensor, float32."""
    return files[name].read(part)


Read = Callable[[str, tuple[slice, ...]], np.ndarray]
"""Returns a part of a tensor, by its name without prefix, in float32."""


def place(read: Read, bar, layout: Layout, placed: NamedSharding) -> jax.Array:
    """Reads one of our arrays onto the mesh; stacked blocks are filled on the devices block by block.

    Args:
      read: see `Read`.
      bar: progress bar, in tensors.
      layout: how the array is stored in tensors.
      placed: the array's sharding.
    """

    def of_one(name: str, sharding: NamedSharding) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            return layout.from_tensor(index, functools.partial(read, name))

        array = jax.block_until_ready(jax.make_array_from_callback(layout.shape, sharding, part))
        bar.advance()
        return array

    if not layout.stacked:
        return of_one(layout.names[0], placed)
    array = jnp.zeros((len(layout.names), *layout.shape), device=placed)
    for block, name in enumerate(layout.names):
        of_layer = of_one(name, NamedSharding(placed.mesh, PartitionSpec(*placed.spec[1:])))
        array = jax.block_until_ready(_with_block(array, of_layer, block, sharding=placed))
    return array


@functools.partial(jax.jit, donate_argnums=0, static_argnames="sharding")
def _with_block(array: jax.Array, layer: jax.Array, block: int, *, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jax.lax.dynamic_update_index_in_dim(array, layer, block, 0), sharding)


def save_language_model(
    folder: str | pathlib.Path,
    parameters: dict,
    config: language_model.Config,
    *,
    maximum_shard_bytes: int = MAXIMUM_SHARD_BYTES,
) -> None:
    """Writes config.json and float32 safetensors that transformers loads as GPT2-, Llama- or MistralForCausalLM.

    Every process must call this; the first one writes. The host holds one file's tensors at a time. The same parameters
    give the same bytes.

    Args:
      folder: a local folder, created if missing.
      parameters: tree of `language_model.init`, sharded or not.
      config: the model's dimensions.
      maximum_shard_bytes: bytes of tensors per file; larger models are written as several files with an index. A
        larger tensor gets its own file.

    Raises:
      UserError: the folder already has weights.
    """
    folder = pathlib.Path(folder)
    if held := sorted(folder.glob("model*.safetensors*")):
        raise UserError(f"{held[0]}: the folder already has weights; choose another one or delete them")
    barrier(f"saving {folder}")
    writes = jax.process_index() == 0
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    tensor_files.write(folder, tensors(parameters, config), maximum_shard_bytes)
    if writes:
        content = json.dumps(huggingface_config.to_json(config), indent=2) + "\n"
        (folder / "config.json").write_text(content, encoding="utf-8")
    barrier(f"saved {folder}")


def tensors(parameters: dict, config: language_model.Config) -> list[Tensor]:
    """The tensors of a checkpoint with their full names; each is fetched from the devices when it is read."""
    family = language_model.family(config)
    result = []
    for layout, array in zip(
        jax.tree.leaves(layouts(family, parameters, config.blocks)), jax.tree.leaves(parameters), strict=True
    ):
        for block, name in enumerate(layout.names):
            read = functools.partial(_tensor, layout, array, block)
            result.append(Tensor(full_name(family, name), layout.tensor_shape, read))
    return result


def _tensor(layout: Layout, array: jax.Array, block: int) -> np.ndarray:
    """One whole tensor on the host; every process must call this."""
    return layout.to_tensor(tensor_files.on_host(array[block] if layout.stacked else array))
