"""Exports a trained memory to a folder for PyTorch: `mlpmem export --format=transformers` or `reference`.

`transformers`: base LM and memory together, with the module that combines them; loading needs only torch and
transformers. `reference`: the memory alone, as the state dict and config of the reference implementation's classes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.resources
import json
import pathlib
import shutil
from collections.abc import Iterator

import jax
import ml_collections
from etils import epath

from mlpmem_jax.core.artifacts import Artifact, open_artifact
from mlpmem_jax.core.errors import UserError
from mlpmem_jax.core.mesh import barrier
from mlpmem_jax.core.progress import say
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.corpus.tokenizer import begin_ids
from mlpmem_jax.corpus.tokens import TOKENIZER_FILE, read_tokenizer
from mlpmem_jax.inference.weight import find_weight, read_report
from mlpmem_jax.interop import huggingface, huggingface_config, memory_tensors, model_card, tensor_files
from mlpmem_jax.models import saved
from mlpmem_jax.models.memory import MemoryConfig

MODULE = "modeling_mlp_memory"
_PARTIAL = ".partial"
BASE_PREFIX, MEMORY_PREFIX = "base.", "memory."
_REFERENCE_CLASSES = {"gpt2": "GPT2MLPModel", "llama": "LlamaMLPModel", "mistral": "MistralMLPModel"}


def transformers_folder(
    config: ml_collections.ConfigDict,
    output: str,
    *,
    maximum_shard_bytes: int = tensor_files.MAXIMUM_SHARD_BYTES,
) -> pathlib.Path:
    """Writes base LM and memory of `config.workdir` as a folder that transformers' Auto classes load.

    Raises:
      UserError: a model is missing, or the output folder is not empty.
    """
    workdir = epath.Path(config.workdir)
    sharding = Sharding.of(config)
    tokens = open_artifact(workdir / "tokens", "tokens")
    base, base_model, base_artifact = saved.load_language_model(workdir / "base", sharding)
    memory, model, artifact = saved.load_memory(workdir / "memory", sharding)
    artifact.check_made_from({"base": base_artifact})
    base_artifact.check_made_from({"tokens": tokens})
    weight = find_weight(workdir, artifact)
    base_json = huggingface_config.to_json(base_model)
    values = {
        "model_type": "mlp_memory",
        "architectures": ["MLPMemoryForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{MODULE}.MLPMemoryConfig",
            "AutoModel": f"{MODULE}.MLPMemoryModel",
            "AutoModelForCausalLM": f"{MODULE}.MLPMemoryForCausalLM",
        },
        "base_config": base_json,
        "memory_config": memory_tensors.to_json(model, base_json),
        "input_width": model.input_width,
        "input_block": saved.input_block(artifact),
        "interpolation_weight": weight.value,
        "tie_word_embeddings": base_json["tie_word_embeddings"],
        "dtype": "float32",
        "provenance": _provenance(tokens, base_artifact, artifact),
    }
    if measured := read_report(workdir, artifact):
        values["provenance"]["perplexity"] = measured["perplexity"]
    tensors = [
        dataclasses.replace(tensor, name=f"{prefix}{tensor.name}")
        for prefix, group in (
            (BASE_PREFIX, huggingface.tensors(base, base_model)),
            (MEMORY_PREFIX, memory_tensors.tensors(memory, model)),
        )
        for tensor in group
    ]
    with output_folder(output) as folder:
        tensor_files.write(folder, tensors, maximum_shard_bytes)
        if jax.process_index() == 0:
            _write_tokenizer(folder, tokens, base_model.context_length)
            _write_json(folder / "config.json", values)
            module = importlib.resources.files("mlpmem_jax.interop") / f"{MODULE}.py"
            (folder / f"{MODULE}.py").write_bytes(module.read_bytes())
            (folder / "README.md").write_text(model_card.render(values), encoding="utf-8")
    return pathlib.Path(output)


def reference_folder(config: ml_collections.ConfigDict, output: str) -> pathlib.Path:
    """Writes the memory of `config.workdir` as the reference implementation's state dict and config.

    Raises:
      UserError: the memory is missing, the reference has no class for its shape, or the output folder is not empty.
    """
    workdir = epath.Path(config.workdir)
    sharding = Sharding.of(config)
    _, base_model, _ = saved.load_language_model(workdir / "base", sharding)
    parameters, model, artifact = saved.load_memory(workdir / "memory", sharding)
    _check_reference_has_it(model, artifact)
    values = memory_tensors.to_json(model, huggingface_config.to_json(base_model))
    # The reference takes the two widths as arguments of the class, not from its config.
    values |= {"architectures": [_REFERENCE_CLASSES[values["model_type"]]]}
    values |= {"input_dim": model.input_width, "output_dim": model.width}
    with output_folder(output) as folder:
        tensor_files.write(folder, memory_tensors.tensors(parameters, model))
        if jax.process_index() == 0:
            _write_json(folder / "config.json", values)
    return pathlib.Path(output)


def _check_reference_has_it(model: MemoryConfig, artifact: Artifact) -> None:
    if model.family == "gpt2" and model.feed_forward_width != 4 * model.width:
        raise UserError(
            f"{artifact.path}: its feed-forward layers are {model.feed_forward_width} wide; the reference's GPT-2 "
            f"memory has 4 x {model.width}. Export it with --format=transformers"
        )


@contextlib.contextmanager
def output_folder(output: str) -> Iterator[pathlib.Path]:
    """Yields a folder to fill, whose files are moved into the output folder once complete.

    It is inside the output folder, which may exist and be empty, such as "." or a mounted volume.
    """
    final = pathlib.Path(output)
    partial = final / _PARTIAL
    if final.exists() and (not final.is_dir() or any(entry != partial for entry in final.iterdir())):
        raise UserError(f"--output={output}: is not empty; delete it, or name another folder")
    if jax.process_index() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier("export begun")
    yield partial
    if jax.process_index() == 0:
        for file in partial.iterdir():
            file.replace(final / file.name)
        partial.rmdir()
        say(f"export: {final}")
    barrier("export written")


def _write_json(file: pathlib.Path, values: dict) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_tokenizer(folder: pathlib.Path, tokens: Artifact, context_length: int) -> None:
    tokenizer, end_id = read_tokenizer(tokens), tokens.summary["end_of_text_id"]
    # If the tokenizer puts no token before a text, the end of another text precedes it.
    begin_id = next(iter(begin_ids(tokenizer)), end_id)
    begin, end = tokenizer.id_to_token(begin_id), tokenizer.id_to_token(end_id)
    (folder / TOKENIZER_FILE).write_bytes(tokens.read_file(TOKENIZER_FILE))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": begin,
            "eos_token": end,
            "pad_token": end,
            "padding_side": "left",
            "model_max_length": context_length,
            "clean_up_tokenization_spaces": False,
        },
    )
    ids = {"bos_token_id": begin_id, "eos_token_id": end_id, "pad_token_id": end_id}
    _write_json(folder / "generation_config.json", ids)


def _provenance(tokens: Artifact, base: Artifact, memory: Artifact) -> dict:
    """The memory's origin; for an imported one, as stated by its source."""
    if "provenance" in memory.summary:
        return dict(memory.summary["provenance"])
    names = ("step", "positions", "training_flops")
    training = {name: memory.summary[name] for name in names if name in memory.summary}
    return {
        "parameters": {"base": base.summary["parameter_count"], "memory": memory.summary["parameter_count"]},
        "fingerprints": {"tokens": tokens.fingerprint, **memory.inputs, "memory": memory.fingerprint},
        "made_by": memory.config,
        "training": training,
    }
