"""The compared systems, all built from one working directory.

A system is a language model, optionally with passages in its prompt, and optionally with a side mixed into its
distribution. Systems that share a language model also share its forward passes.
"""

from __future__ import annotations

import dataclasses
import functools
import json

import ml_collections
import numpy as np
from etils import epath

from mlpmem_jax.comparison.greedy import Decoder
from mlpmem_jax.comparison.passages import Retriever, open_retriever
from mlpmem_jax.comparison.reading import Model
from mlpmem_jax.comparison.searching import open_key_index
from mlpmem_jax.comparison.sides import MemorySide, NeighborsSide, Side
from mlpmem_jax.core.artifacts import Artifact, open_artifact
from mlpmem_jax.core.config import plain_dict
from mlpmem_jax.core.errors import ArtifactError, ConfigError
from mlpmem_jax.core.manifests import is_sealed
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.models import saved
from mlpmem_jax.training import controls, lora


@dataclasses.dataclass(frozen=True)
class System:
    """One system.

    Attributes:
      title: display name.
      model: the language model, a key of `FOLDERS`.
      side: what is mixed in, a name for `Workdir.side`; "" = nothing.
      retrieves: whether its prompts have passages.
    """

    title: str
    model: str = "base"
    side: str = ""
    retrieves: bool = False


SYSTEMS = {
    "base": System("base LM"),
    "memory": System("base LM + memory", side="memory"),
    "knn_lm": System("kNN-LM", side="knn"),
    "rag": System("RAG", retrieves=True),
    "cpt": System("continued pretraining", model="continued"),
    "lora": System("LoRA", model="lora"),
    "memory+rag": System("memory + RAG", side="memory", retrieves=True),
    "cpt+memory": System("continued pretraining + memory", model="continued", side="memory"),
}
_INPUTS = {
    **{name: name for name in ("tokens", "base", "memory", "datastore/train")},
    "datastore": "datastore/train",
    "targets": "targets/train",
}
"""Folders of the artifacts that systems are built from, by their names in manifests."""
FOLDERS = {"base": "base", "continued": controls.CONTINUED, "lora": lora.FOLDER}
SIDE_MODEL = "base"  # sides read its hidden states: the memory was trained on them, and keys are made of them


def parse(names: str) -> list[str]:
    """Parses system names, separated by commas.

    Raises:
      ConfigError: a system is unknown.
    """
    chosen = [name for name in names.split(",") if name]
    for name in chosen:
        if name not in SYSTEMS:
            raise ConfigError(f"comparison system {name!r}: unknown; expected some of {', '.join(SYSTEMS)}")
    if not chosen:
        raise ConfigError(f"config.comparison.systems: is empty; expected some of {', '.join(SYSTEMS)}")
    return list(dict.fromkeys(["base", *chosen]))  # all systems are compared with the base


class Workdir:
    """The parts that systems are built from, in one working directory; each is loaded on first use."""

    def __init__(self, config: ml_collections.ConfigDict):
        self.config, self.path = config, epath.Path(config.workdir)
        self.sharding = Sharding.of(config)
        self.results = self.path / "comparison"
        self.indices = self.results / "index"
        self.tokens = self.artifact("tokens", "tokens")

    @functools.cache  # noqa: B019  one working directory per command
    def artifact(self, folder: str, kind: str) -> Artifact:
        """A finished artifact, checked to be built from those in the working directory.

        Raises:
          ArtifactError: it is not finished, or was made from another one than is there now.
        """
        artifact = open_artifact(self.path / folder, kind)
        for name, other in _INPUTS.items():
            if name in artifact.inputs and is_sealed(self.path / other):
                artifact.check_made_from({name: self.artifact(other, other.partition("/")[0])})
        return artifact

    def parts(self, system: System) -> dict[str, Artifact]:
        """The artifacts that a system is built from, by role.

        The roles are "base"; "model", another language model, trained for the system; "memory"; and "datastore",
        "targets" and "key_model", of which a memory is made and in which kNN-LM searches.

        Raises:
          ArtifactError: one is not finished.
        """
        artifacts = {}
        if system.model != SIDE_MODEL:
            artifacts["model"] = self.artifact(FOLDERS[system.model], "base")
        if system.side or system.model == SIDE_MODEL:
            artifacts["base"] = self.artifact(FOLDERS[SIDE_MODEL], "base")
        if system.side == "memory":
            artifacts["memory"] = self.artifact("memory", "memory")
        if system.side:
            artifacts["datastore"] = self.artifact("datastore/train", "datastore")
            artifacts["targets"] = self.artifact("targets/train", "targets")
            if "key_model" in artifacts["datastore"].inputs:
                artifacts["key_model"] = self.artifact("key_model", "base")
        return artifacts

    @functools.cache  # noqa: B019  one working directory per command
    def model(self, name: str) -> Model:
        """The language model with a key of `FOLDERS`, on the mesh."""
        self.artifact(FOLDERS[name], "base")
        parameters, config, _ = saved.load_language_model(self.path / FOLDERS[name], self.sharding)
        return Model(parameters, config)

    def decoders(self, system: System, side: Side | None) -> tuple[Decoder, Decoder | None]:
        """(decoder of the system's language model, that of the model whose hidden states the side reads).

        They are the same object if it is the same model; the second is None without a side.
        """
        is_shared = system.model == SIDE_MODEL
        decoder = Decoder(self.model(system.model), side if is_shared else None, self.sharding)
        if side is None:
            return decoder, None
        return decoder, decoder if is_shared else Decoder(self.model(SIDE_MODEL), side, self.sharding)

    @functools.cache  # noqa: B019
    def side(self, name: str) -> Side:
        """The side with a name: "memory" or "knn"."""
        if name == "memory":
            self.artifact("memory", "memory")
            parameters, config, artifact = saved.load_memory(self.path / "memory", self.sharding)
            return MemorySide(parameters, config, saved.input_block(artifact))
        return self._over_datastore()

    @property
    def k(self) -> int:
        """The number of neighbors of kNN-LM."""
        return self.config.comparison.k or self.config.targets.k

    @property
    def search_settings(self) -> str:
        """The settings of kNN-LM's search, which its scores depend on."""
        return json.dumps({**plain_dict(self.config.targets), "k": self.k}, sort_keys=True)

    def neighbors(self, index, next_tokens_N: np.ndarray) -> NeighborsSide:
        """kNN search over an index of keys, with the config's settings.

        Raises:
          UserError: the keys come from another model, or no temperature is set.
        """
        if self.config.datastore.key_model:
            raise ConfigError(
                "config.datastore.key_model: kNN-LM needs keys from the base itself, not from another model"
            )
        targets = self.artifact("targets/train", "targets")
        temperature = targets.summary.get("temperature") or self.config.targets.temperature
        if not temperature:
            raise ArtifactError(f"{targets.path}: has no temperature; set config.targets.temperature")
        block = self.model(SIDE_MODEL).config.blocks
        return NeighborsSide(index, next_tokens_N, block, min(self.k, len(next_tokens_N)), temperature)

    def _over_datastore(self) -> NeighborsSide:
        datastore = self.artifact("datastore/train", "datastore")
        next_tokens_N = datastore.read("next_tokens", 0, datastore.arrays["keys"].shape[0]).reshape(-1).astype(np.int32)
        settings = {**self.config.targets, "k": min(self.k, len(next_tokens_N))}
        return self.neighbors(open_key_index(datastore, settings, self.sharding.mesh, self.indices), next_tokens_N)

    @functools.cached_property
    def retriever(self) -> Retriever:
        """A retriever over the training passages."""
        settings, mesh = self.config.comparison, self.sharding.mesh
        return open_retriever(
            settings.retriever, self.tokens, settings.passage_words, self.config.targets, mesh, self.indices
        )
