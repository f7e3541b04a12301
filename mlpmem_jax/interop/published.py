"""Dimensions of published language models by Hugging Face name: planning needs neither network nor weights.

Source: config.json of the model on huggingface.co.
"""

from __future__ import annotations

from etils import epath

from mlpmem_jax.core.errors import UserError
from mlpmem_jax.core.gguf_file import GGUFFile
from mlpmem_jax.interop import gguf_model, huggingface_config
from mlpmem_jax.models.gpt2 import GPT2Config
from mlpmem_jax.models.language_model import Config
from mlpmem_jax.models.llama import LlamaConfig

DIMENSIONS: dict[str, Config] = {
    "openai-community/gpt2": GPT2Config(50257, 1024, 768, 12, 12),
    "openai-community/gpt2-medium": GPT2Config(50257, 1024, 1024, 24, 16),
    "openai-community/gpt2-large": GPT2Config(50257, 1024, 1280, 36, 20),
    "openai-community/gpt2-xl": GPT2Config(50257, 1024, 1600, 48, 25),
    "meta-llama/Llama-2-7b-hf": LlamaConfig(32000, 4096, 4096, 32, 32, 32, 128, 11008, 1e-5),
    "mistralai/Mistral-7B-v0.3": LlamaConfig(32768, 32768, 4096, 32, 32, 8, 128, 14336, 1e-5, family="mistral"),
}


def dimensions(source: str) -> Config:
    """Dimensions of the model of that name, of the one in a folder, or of a GGUF file.

    Raises:
      UserError: neither.
    """
    if (name := source.partition("@")[0]) in DIMENSIONS:
        return DIMENSIONS[name]
    if source.endswith(".gguf"):
        return gguf_model.read_config(GGUFFile(source))
    folder = epath.Path(source)
    if folder.is_dir():
        return huggingface_config.read_config(folder)
    raise UserError(
        f"{source}: dimensions are known without downloading of {', '.join(DIMENSIONS)}; for another "
        "model give a folder with its config.json"
    )
