"""Exports the LoRA of a working directory as a folder that `peft` loads on top of the base it was trained on."""

from __future__ import annotations

import json
import pathlib

import jax
import ml_collections
import numpy as np
import safetensors.numpy
from etils import epath

from mlpmem_jax.core.artifacts import open_artifact
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.interop.export_model import output_folder
from mlpmem_jax.models import language_model, saved
from mlpmem_jax.training import lora


def export(config: ml_collections.ConfigDict, output: str) -> None:
    """Writes the adapters of `config.workdir`.

    Raises:
      UserError: LoRA was not trained there, or the output folder is not empty.
    """
    workdir = epath.Path(config.workdir)
    artifact = open_artifact(workdir / lora.FOLDER, "base")
    adapters = lora.load_adapters(artifact, Sharding.of(config))
    with output_folder(output) as folder:
        if jax.process_index() == 0:
            write(folder, adapters, saved.language_model_config(artifact), config.base.path)


def write(folder: pathlib.Path, adapters: dict, model: language_model.Config, base: str) -> None:
    """Writes adapters, in the form of `lora.init`, for a language model whose name or folder is `base`."""
    checkpoint = language_model.checkpoint(language_model.family(model))
    tensors, modules = {}, []
    for path, adapter in adapters.items():
        module = path.removesuffix(".kernel")
        modules.append(module)
        for block in range(model.blocks):
            name = f"base_model.model.{checkpoint.prefix}{checkpoint.blocks}.{block}.{module}"
            a_IxY, b_YxO = np.asarray(adapter["a"][block]), np.asarray(adapter["b"][block])
            tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(a_IxY.T)
            tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(b_YxO.reshape(len(b_YxO), -1).T)
    rank = next(iter(adapters.values()))["a"].shape[-1]
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": lora.SCALE * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
        "fan_in_fan_out": not checkpoint.transposed,  # GPT-2's Conv1D
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
