"""Trained models in a working directory: sealed artifacts with dimensions and parameters."""

from __future__ import annotations

import dataclasses

import jax

from mlpmem_jax.core import parameters as stored
from mlpmem_jax.core.artifacts import Artifact, ArtifactWriter, open_artifact
from mlpmem_jax.core.errors import ArtifactError
from mlpmem_jax.core.mesh import barrier
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.models import language_model, memory
from mlpmem_jax.models.memory import MemoryConfig


def seal(writer: ArtifactWriter, model: language_model.Config | MemoryConfig, parameters, metrics: dict) -> Artifact:
    """Writes the parameters, seals the artifact and opens it; every process must call this.

    Args:
      writer: writer of an artifact of kind "base" or "memory".
      model: the model's dimensions.
      parameters: float32 tree, sharded or not.
      metrics: JSON values to store, such as the selected step.
    """
    stored.write(writer.path, parameters)
    summary = {
        "model": dataclasses.asdict(model),
        "parameters_fingerprint": stored.fingerprint(parameters),
        "parameter_count": sum(array.size for array in jax.tree.leaves(parameters)),
        **metrics,
    }
    if jax.process_index() == 0:
        writer.seal(summary)
    barrier(f"sealed {writer.path}")
    return open_artifact(writer.path, writer.kind)


def language_model_config(artifact: Artifact) -> language_model.Config:
    """Dimensions of the language model in a finished base.

    Raises:
      ArtifactError: this installation does not know the model's family.
    """
    try:
        return language_model.from_fields(artifact.summary["model"])
    except ValueError as error:
        raise ArtifactError(f"{artifact.path}: {error}; upgrade mlpmem_jax") from error


def load_language_model(path, sharding: Sharding) -> tuple[dict, language_model.Config, Artifact]:
    """Parameters on the mesh, dimensions and artifact of a language model.

    Raises:
      ArtifactError: there is no finished base at `path`.
    """
    artifact = open_artifact(path, "base")
    config = language_model_config(artifact)
    abstract = language_model.abstract_parameters(config)
    placed = sharding.tree(language_model.logical_axes(config), abstract)
    return stored.read(artifact, abstract, placed), config, artifact


def load_memory(path, sharding: Sharding) -> tuple[dict, MemoryConfig, Artifact]:
    """Parameters on the mesh, dimensions and artifact of a memory.

    Raises:
      ArtifactError: there is no finished memory at `path`.
    """
    artifact = open_artifact(path, "memory")
    config = MemoryConfig(**artifact.summary["model"])
    abstract = memory.abstract_parameters(config)
    placed = sharding.tree(memory.logical_axes(config))
    return stored.read(artifact, abstract, placed), config, artifact


def input_block(memory: Artifact) -> int:
    """The block of the base, counted from 1, whose feed-forward input a finished memory reads.

    Raises:
      ArtifactError: the memory does not record it.
    """
    if "input_block" not in memory.summary:
        raise ArtifactError(
            f"{memory.path}: was made by an earlier version and does not record which block of the base it reads; "
            "delete it and run `train` again"
        )
    return memory.summary["input_block"]
