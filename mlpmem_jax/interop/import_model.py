"""Imports a folder of PyTorch weights as artifacts: `mlpmem import --from=DIR`.

Reads both formats of `export_model`; in the reference's format, weights may also be in pytorch_model.bin. An imported
artifact is like any other: training, evaluation and generation continue from it.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping

import ml_collections
from etils import epath

from mlpmem_jax.core import parameters as stored
from mlpmem_jax.core.artifacts import Artifact, ArtifactWriter, find_finished, open_artifact
from mlpmem_jax.core.errors import ConfigError, UserError
from mlpmem_jax.core.manifests import read_manifest
from mlpmem_jax.core.progress import say
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.corpus.tokens import TOKENIZER_FILE
from mlpmem_jax.interop import huggingface, huggingface_config, memory_tensors, tensor_files
from mlpmem_jax.interop.base_model import check_fits
from mlpmem_jax.interop.export_model import BASE_PREFIX, MEMORY_PREFIX
from mlpmem_jax.interop.tensor_files import Tensor
from mlpmem_jax.models import language_model, saved
from mlpmem_jax.models.memory import MemoryConfig
from mlpmem_jax.retrieval.datastore import block_at_depth
from mlpmem_jax.training.memory_task import vocabulary_multiple

_DEFAULT_WEIGHT = 0.25  # the paper's for WikiText-103; the reference stores none with its weights
_KEYS = ("base_config", "memory_config", "input_block", "interpolation_weight", "provenance")


def run(config: ml_collections.ConfigDict, source: str) -> Artifact:
    """Imports `memory`, and from the transformers format also `base`, into `config.workdir`.

    Args:
      config: the resolved config; its workdir has tokens, and for the reference format the base.
      source: the folder to read.

    Raises:
      UserError: the folder, one of its tensors, or its vocabulary does not match; says which.
    """
    folder, workdir = pathlib.Path(source), epath.Path(config.workdir)
    values = _read_config(folder)
    tensors = tensor_files.read(folder)
    tokens = open_artifact(workdir / "tokens", "tokens")
    sharding = Sharding.of(config)
    multiple = vocabulary_multiple(sharding.mesh.shape["tensor"])
    if values.get("model_type") != "mlp_memory":
        base = open_artifact(workdir / "base", "base")
        model = _memory_config(folder, values, tensors, saved.language_model_config(base), tokens, multiple)
        summary = {"validation": {"interpolation_weight": _DEFAULT_WEIGHT}}
        say(f"import: {folder} has no interpolation weight; using {_DEFAULT_WEIGHT}")
    else:
        base_model = huggingface_config.read_config(folder, "base")
        _check_fits(config, folder, values, base_model, tokens)
        tensors = _memory_part(tensors)
        model = _memory_config(folder, values["memory_config"], tensors, base_model, tokens, multiple, MEMORY_PREFIX)
        base_parameters, _ = huggingface.load_language_model(source, sharding, part="base")
        base = _sealed(workdir, "base", base_model, base_parameters, {}, {"tokens": tokens.fingerprint})
        summary = {"validation": {"interpolation_weight": values["interpolation_weight"]}}
        summary["provenance"] = values["provenance"]
    blocks = saved.language_model_config(base).blocks
    summary["input_block"] = block_at_depth(blocks, config.datastore.input_depth)
    parameters = memory_tensors.load(tensors, model, sharding)
    return _sealed(workdir, "memory", model, parameters, summary, {"base": base.fingerprint})


def _read_config(folder: pathlib.Path) -> dict:
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        is_ours = values.get("model_type") == "mlp_memory"
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: expected the config of a memory: {error}") from error
    if is_ours and (missing := [key for key in _KEYS if key not in values]):
        raise UserError(f"{file}: {missing[0]} is missing; this is not the config of an exported memory")
    return values


def _check_fits(
    config: ml_collections.ConfigDict,
    folder: pathlib.Path,
    values: Mapping,
    base: language_model.Config,
    tokens: Artifact,
) -> None:
    """Checks tokenizer, context and input block of an exported folder against the working directory's."""
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        raise UserError(f"{file}: is missing; an exported memory includes its tokenizer")
    if json.loads(file.read_bytes()) != json.loads(tokens.read_file(TOKENIZER_FILE)):
        raise UserError(
            f"{file}: is not the tokenizer of {tokens.path}; make the tokens with "
            f"--config.tokenizer.source=file --config.tokenizer.path={file}"
        )
    check_fits(folder, base, tokens, config.base.context_length)
    block, block_here = values["input_block"], block_at_depth(base.blocks, config.datastore.input_depth)
    if block != block_here:
        raise ConfigError(
            f"config.datastore.input_depth: {config.datastore.input_depth} of {base.blocks} blocks is block "
            f"{block_here}; the memory of {folder} reads block {block}: set it to {block / base.blocks:.4g}"
        )


def _memory_part(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        if not name.startswith((BASE_PREFIX, MEMORY_PREFIX)):
            raise UserError(f"{tensor.file}: tensor {name!r} belongs to neither base nor memory")
    return {
        name.removeprefix(MEMORY_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(MEMORY_PREFIX)
    }


def _memory_config(
    folder: pathlib.Path,
    values: Mapping,
    tensors: Mapping[str, Tensor],
    base: language_model.Config,
    tokens: Artifact,
    multiple: int,
    prefix: str = "",
) -> MemoryConfig:
    """Dimensions of the memory, checked against its tensors and the base."""
    file = folder / "config.json"
    model = memory_tensors.from_json(values, base.width, multiple, str(file))
    vocabularies = base.vocab_size, tokens.summary["vocab_size"]
    if model.vocab_size not in vocabularies:
        raise UserError(
            f"{file}: the memory has a vocabulary of {model.vocab_size}, the base of {vocabularies[0]}; both must use "
            "the same tokenizer"
        )
    transform = tensors.get("embedding_transform.weight")
    if transform is not None and transform.shape != (model.width, base.width):
        raise UserError(
            f"{transform.file}: tensor {transform.name!r} is {transform.shape}; from a base of width {base.width} to a "
            f"memory of width {model.width} it would be {(model.width, base.width)}"
        )
    tensor_files.check(tensors, memory_tensors.shapes(model), str(folder), prefix)
    return model


def _sealed(
    workdir: epath.Path, kind: str, model: language_model.Config | MemoryConfig, parameters, summary: dict, inputs: dict
) -> Artifact:
    """Writes the artifact of imported parameters; an existing one must be identical."""
    path, fingerprint = workdir / kind, stored.fingerprint(parameters)
    manifest = read_manifest(str(path))
    if kind == "base" and manifest and manifest["sealed"]:
        artifact = open_artifact(path, kind)
        from_tokens = artifact.inputs["tokens"] == inputs["tokens"]
        if artifact.summary["parameters_fingerprint"] == fingerprint and from_tokens:
            say("base: is already the same")
            return artifact
    made_by = {"imported": {"parameters": fingerprint, **summary}}
    if finished := find_finished(path, kind, made_by, inputs):
        say(f"{kind}: imported already")
        return finished
    writer = ArtifactWriter.create(path, kind, made_by, inputs, {})
    artifact = saved.seal(writer, model, parameters, summary)
    say(f"import: {path}, {artifact.summary['parameter_count']:,} parameters")
    return artifact
