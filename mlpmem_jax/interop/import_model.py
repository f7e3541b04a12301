"""A folder of PyTorch weights as artifacts: `mlpmem import --from=DIR`.

Both formats of `export_model` are read, with their weights in safetensors or in pytorch_model.bin. What was imported
is an artifact like any other; training, evaluation and generation go on from it.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping

import ml_collections
from etils import epath
from jax.sharding import Mesh

from mlpmem_jax.core import mesh as meshes
from mlpmem_jax.core import parameters as stored
from mlpmem_jax.core.artifacts import Artifact, ArtifactWriter, find_finished, open_artifact, read_manifest
from mlpmem_jax.core.errors import ConfigError, UserError
from mlpmem_jax.core.progress import say
from mlpmem_jax.corpus.tokens import TOKENIZER_FILE
from mlpmem_jax.interop import base_tensors, memory_tensors, tensor_files
from mlpmem_jax.interop.export_model import BASE_PREFIX, MEMORY_PREFIX
from mlpmem_jax.interop.tensor_files import Tensor
from mlpmem_jax.models import saved
from mlpmem_jax.retrieval.datastore import tapped_block
from mlpmem_jax.training.memory import vocabulary_multiple

_DEFAULT_WEIGHT = 0.25  # the paper's for WikiText-103; the reference keeps none with its weights


def run(config: ml_collections.ConfigDict, source: str) -> Artifact:
    """Makes `memory`, and from the transformers format also `base`, in `config.workdir`.

    Args:
      config: resolved; its workdir holds tokens, and for the reference format the base.
      source: the folder to read.

    Raises:
      UserError: the folder, one of its tensors, or its vocabulary does not fit; the text names which.
    """
    folder = pathlib.Path(source)
    values = _read_config(folder)
    tensors = tensor_files.read(folder)
    tokens = open_artifact(epath.Path(config.workdir) / "tokens", "tokens")
    mesh, rules = meshes.mesh_of(config)
    if values.get("model_type") == "mlp_memory":
        _check_tokenizer(folder, tokens)
        base = _import_base(config, folder, values, _under(tensors, BASE_PREFIX), tokens, mesh, rules)
        strangers = [name for name in tensors if not name.startswith((BASE_PREFIX, MEMORY_PREFIX))]
        if strangers:
            raise UserError(f"{tensors[strangers[0]].file}: tensor {strangers[0]!r} belongs to no part of this model")
        tensors = _under(tensors, MEMORY_PREFIX)
        _check_input_block(config, values["input_block"], base, folder)
        figures = {"validation": {"interpolation_weight": values["interpolation_weight"]}}
        figures["provenance"] = values["provenance"]
        values = values["memory_config"]
    else:
        base = open_artifact(epath.Path(config.workdir) / "base", "base")
        figures = {"validation": {"interpolation_weight": _DEFAULT_WEIGHT}}
        say(f"import: {folder} holds no interpolation weight; taking {_DEFAULT_WEIGHT}")
    return _import_memory(config, folder, values, tensors, figures, tokens, base, mesh, rules)


def _read_config(folder: pathlib.Path) -> dict:
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: expected the config of an exported memory: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected an object of keys and values, found {type(values).__name__}")
    needed = {"base_config", "memory_config", "input_block", "interpolation_weight", "provenance"}
    if values.get("model_type") == "mlp_memory" and (missing := sorted(needed - values.keys())):
        raise UserError(f"{file}: {missing[0]} is missing; this is no config of an exported memory")
    return values


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _check_tokenizer(folder: pathlib.Path, tokens: Artifact) -> None:
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        raise UserError(f"{file}: is missing; an exported memory has its tokenizer beside it")
    if json.loads(file.read_bytes()) != json.loads(tokens.read_file(TOKENIZER_FILE)):
        raise UserError(
            f"{file}: is another tokenizer than that of {tokens.path}; make the tokens with "
            f"--config.tokenizer.source=file --config.tokenizer.path={file}"
        )


def _check_input_block(config: ml_collections.ConfigDict, block: int, base: Artifact, folder: pathlib.Path) -> None:
    blocks = base.summary["model"]["blocks"]
    if tapped_block(blocks, config.datastore.input_depth) != block:
        raise ConfigError(
            f"config.datastore.input_depth: {config.datastore.input_depth} of {blocks} blocks is block "
            f"{tapped_block(blocks, config.datastore.input_depth)}; the memory of {folder} reads block {block}: set it "
            f"to {block / blocks:.4g}"
        )


def _import_base(
    config: ml_collections.ConfigDict,
    folder: pathlib.Path,
    values: Mapping,
    tensors: Mapping[str, Tensor],
    tokens: Artifact,
    mesh: Mesh,
    rules: meshes.Rules,
) -> Artifact:
    model = base_tensors.from_json(values["base_config"], folder / "config.json")
    if model.vocab_size < tokens.summary["vocab_size"]:
        raise UserError(
            f"{folder}: its base has a vocabulary of {model.vocab_size}, but the tokenizer makes ids up to "
            f"{tokens.summary['vocab_size'] - 1}; use the tokenizer that belongs to this model"
        )
    if model.context_length < config.base.context_length:
        raise ConfigError(
            f"config.base.context_length: {config.base.context_length} is longer than the {model.context_length} "
            f"positions of {folder}"
        )
    tensor_files.check(tensors, base_tensors.shapes(model), str(folder))
    parameters = base_tensors.load(tensors, model, mesh, rules)
    return _sealed(config, "base", model, parameters, {}, {"tokens": tokens.fingerprint})


def _import_memory(
    config: ml_collections.ConfigDict,
    folder: pathlib.Path,
    values: Mapping,
    tensors: Mapping[str, Tensor],
    figures: Mapping,
    tokens: Artifact,
    base: Artifact,
    mesh: Mesh,
    rules: meshes.Rules,
) -> Artifact:
    width = base.summary["model"]["width"]
    transform = tensors.get("embedding_transform.weight")
    model = memory_tensors.from_json(
        values, width, vocabulary_multiple(mesh.shape["tensor"]), str(folder / "config.json")
    )
    if transform is not None and transform.shape[1:] != (width,):
        raise UserError(
            f"{transform.file}: tensor {transform.name!r} is {transform.shape}; the base of {config.workdir} gives the "
            f"memory inputs of width {width}"
        )
    vocabularies = tokens.summary["vocab_size"], base.summary["model"]["vocab_size"]
    if model.vocab_size not in vocabularies:
        raise UserError(
            f"{folder / 'config.json'}: the memory has a vocabulary of {model.vocab_size}, the base of "
            f"{vocabularies[1]}; both must use the same tokenizer"
        )
    tensor_files.check(tensors, memory_tensors.shapes(model), str(folder))
    parameters = memory_tensors.load(tensors, model, mesh, rules)
    return _sealed(config, "memory", model, parameters, dict(figures), {"base": base.fingerprint})


def _sealed(config: ml_collections.ConfigDict, kind: str, model, parameters, figures: dict, inputs: dict) -> Artifact:
    """The artifact of imported parameters; what is there already must be the same."""
    path = epath.Path(config.workdir) / kind
    fingerprint = stored.fingerprint(parameters)
    if kind == "base" and (manifest := read_manifest(str(path))) and manifest["sealed"]:
        base = open_artifact(path, kind)
        if base.summary["parameters_fingerprint"] == fingerprint and base.inputs == inputs:
            say("base: is the same already")
            return base
    made_by = {"imported": {"parameters": fingerprint, **figures}}
    if finished := find_finished(path, kind, made_by, inputs):
        say(f"{kind}: imported already")
        return finished
    writer = ArtifactWriter.create(path, kind, made_by, inputs, {})
    saved.seal(writer, model, parameters, figures)
    artifact = open_artifact(path, kind)
    say(f"import: {path}, {artifact.summary['parameter_count']:,} parameters")
    return artifact
