"""Dimensions of language models before they are imported: of published ones, of a folder, of a GGUF file."""

from __future__ import annotations

from etils import epath

from mlpmem_jax.core import published
from mlpmem_jax.core.errors import UserError
from mlpmem_jax.core.gguf_file import GGUFFile
from mlpmem_jax.interop import gguf_model, huggingface_config
from mlpmem_jax.models import language_model


def dimensions(source: str) -> language_model.Config:
    """Dimensions of the model of that name, in whole or without the owner's, of one in a folder, or of a GGUF file.

    Raises:
      UserError: neither.
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
        if name == model or (is_gguf and name.startswith(f"{model}.")):  # MODEL.QUANTIZATION.gguf, not fetched yet
            return language_model.from_fields(fields)
    if is_gguf:
        GGUFFile(source)  # says that there is no such file
    raise UserError(
        f"{source}: its dimensions are not known without downloading it; give a folder with its config.json, or one of "
        f"{', '.join(published.DIMENSIONS)}"
    )
