"""Dimensions of language models before they are imported: published ones, those in a folder or a GGUF file."""

from __future__ import annotations

from etils import epath

from mlpmem_jax.core import published
from mlpmem_jax.core.errors import UserError
from mlpmem_jax.core.gguf_file import GGUFFile
from mlpmem_jax.interop import gguf_model, huggingface_config
from mlpmem_jax.models import language_model


def dimensions(source: str) -> language_model.Config:
    """Dimensions of a published model by name (with or without its owner), or of one in a folder or a GGUF file.

    Raises:
      UserError: it is none of these.
    """
    if (fields := published.find(source)) is not None:
        return language_model.from_fields(fields)
    is_gguf = source.endswith(".gguf")
    if is_gguf and epath.Path(source).exists():
        return gguf_model.read_config(GGUFFile(source))
    folder = epath.Path(source)
    if folder.is_dir():
        return huggingface_config.read_config(folder)
    name = source.partition("@")[0].rstrip("/").split("/")[-1]
    for known, fields in published.DIMENSIONS.items():
        model = known.split("/")[-1]
        if name == model or (is_gguf and name.startswith(f"{model}.")):  # MODEL.QUANTIZATION.gguf, not downloaded yet
            return language_model.from_fields(fields)
    if is_gguf:
        GGUFFile(source)  # raises the error that there is no such file
    raise UserError(
        f"{source}: its dimensions are unknown without downloading it; set a folder with its config.json, or one of "
        f"{', '.join(published.DIMENSIONS)}"
    )
