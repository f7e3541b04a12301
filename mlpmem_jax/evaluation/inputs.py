"""The inputs of an evaluation: the finished stages of a working directory, checked for consistency."""

from __future__ import annotations

import dataclasses

import ml_collections
import numpy as np
from etils import epath

from mlpmem_jax.core.artifacts import Artifact, open_artifact
from mlpmem_jax.core.errors import ArtifactError, ConfigError
from mlpmem_jax.core.manifests import is_sealed
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.corpus.documents import SPLITS
from mlpmem_jax.corpus.tokens import TokenStream, read_sequences
from mlpmem_jax.models import saved
from mlpmem_jax.retrieval.datastore import memory_inputs
from mlpmem_jax.retrieval.targets_artifact import TargetsReader

HELD_OUT = ("validation", "test")
CONTROLS = {"continued": "base", "ce_only": "memory"}
"""Controls by folder name, and their kind: a language model, or a memory to be mixed with the base."""

_COMPUTE_TOLERANCE = 0.02  # allowed relative difference of FLOPs between `continued` and the memory


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The artifacts of a finished working directory, and the mesh to compute on.

    Attributes:
      config: the evaluation's config.
      artifacts: tokens, base, memory, and datastore and targets by "<kind>/<split>".
      controls: controls trained with this memory's settings, by name.
      controls_left_out: name -> reason, for finished controls that do not match this memory.
      sharding: where and how scores are computed.
    """

    config: ml_collections.ConfigDict
    artifacts: dict[str, Artifact]
    controls: dict[str, Artifact]
    controls_left_out: dict[str, str]
    sharding: Sharding

    @property
    def compute_dtype(self) -> str:
        """Dtype of forward passes: that of the datastore's base scores, or float32 if they were imported."""
        return self.artifacts["datastore/test"].config.get("compute_dtype", "float32")

    def sequences(self, split: str) -> tuple[int, int]:
        """(number of sequences, positions in each)."""
        return self.artifacts[f"datastore/{split}"].arrays["next_tokens"].shape

    def targets(self, split: str) -> TargetsReader:
        """The targets of a split."""
        return TargetsReader(self.artifacts[f"targets/{split}"])

    def shards(self, split: str) -> list[tuple[int, int]]:
        """(first sequence, number of sequences) of every shard."""
        return self.targets(split).shards()

    def memory_inputs(self, split: str, first: int, count: int) -> np.ndarray:
        """Memory inputs [count, T, D]."""
        datastore = self.artifacts[f"datastore/{split}"]
        return datastore.read(memory_inputs(datastore), first, first + count)

    def tokens(self, split: str, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and next tokens, int32 [count, T]."""
        stream = TokenStream(self.artifacts["tokens"], split)
        return read_sequences(stream, first, count, self.sequences(split)[1])[:2]


def open_inputs(config: ml_collections.ConfigDict) -> Inputs:
    """Opens everything that an evaluation of `config.workdir` reads.

    Raises:
      ArtifactError: a stage is missing, or an artifact was built from other artifacts than the ones present.
      ConfigError: the test split is too short for intervals.
    """
    workdir = epath.Path(config.workdir)
    artifacts = {"tokens": open_artifact(workdir / "tokens", "tokens"), "base": open_artifact(workdir / "base", "base")}
    for kind in ("datastore", "targets"):
        for split in SPLITS:
            artifacts[f"{kind}/{split}"] = open_artifact(workdir / kind / split, kind)
    artifacts["memory"] = open_artifact(workdir / "memory", "memory")
    _check_belong_together(artifacts)
    sequences = artifacts["datastore/test"].arrays["next_tokens"].shape[0]
    if sequences < 2:
        raise ConfigError(
            f"config.corpus.test_fraction: the test split has {sequences} sequence of "
            f"{config.base.context_length} tokens, but intervals need at least 2; raise it, or lower "
            "config.base.context_length"
        )
    sharding = Sharding.of(config)
    return Inputs(config, artifacts, *_controls(workdir / "controls", artifacts["memory"]), sharding)


def _check_belong_together(artifacts: dict[str, Artifact]) -> None:
    """Checks that the memory was built from the present datastore and targets, and those from the base and tokens.

    Raises:
      ArtifactError: two artifacts do not match; names their folders.
    """
    datastores = {f"datastore/{split}": artifacts[f"datastore/{split}"] for split in SPLITS}
    base, memory, targets = artifacts["base"], artifacts["memory"], artifacts["targets/train"]
    base.check_made_from({"tokens": artifacts["tokens"]})
    for split in SPLITS:
        artifacts[f"datastore/{split}"].check_made_from({"tokens": artifacts["tokens"], "base": base})
        artifacts[f"targets/{split}"].check_made_from(datastores)
        if not artifacts[f"targets/{split}"].is_imported and artifacts[f"targets/{split}"].config != targets.config:
            raise ArtifactError(
                f"{artifacts[f'targets/{split}'].path}: was built with other settings than {targets.path}; delete "
                "both and run `targets` again"
            )
    memory.check_made_from({"base": base, "datastore": artifacts["datastore/train"], "targets": targets})
    reads, held = (artifacts[name].summary.get("input_block") for name in ("memory", "datastore/test"))
    if reads != held and None not in (reads, held):
        raise ArtifactError(
            f"{memory.path}: reads block {reads} of the base, but {artifacts['datastore/test'].path} has the inputs "
            f"of block {held}; set config.datastore.input_depth to "
            f"{reads / saved.language_model_config(base).blocks:.4g}, delete the datastore and run `datastore` again"
        )


def _controls(folder: epath.Path, memory: Artifact) -> tuple[dict[str, Artifact], dict[str, str]]:
    """The finished controls of this memory, and why other finished controls are left out."""
    kept, left_out = {}, {}
    for name, kind in CONTROLS.items():
        if not is_sealed(folder / name):
            continue
        control = open_artifact(folder / name, kind)
        reason = _other_compute(control, memory) if name == "continued" else _other_settings(control, memory)
        if reason is None:
            kept[name] = control
        else:
            left_out[name] = f"{control.path}: {reason}; delete it and run `controls` again"
    return kept, left_out


def _other_compute(control: Artifact, memory: Artifact) -> str | None:
    """Why the continued base is not a valid control of the memory; None if it is."""
    if control.inputs.get("memory") != memory.fingerprint:
        return "was trained for another memory"
    its, wanted = control.summary["training_flops"], memory.summary["training_flops"]
    # The number of steps is rounded, so compute may differ by half a step, which matters if there are few.
    if abs(its - wanted) > max(_COMPUTE_TOLERANCE * wanted, 0.51 * its / control.summary["steps"]):
        return f"used {its / wanted:.2f} times the memory's training compute"
    return None


def _other_settings(control: Artifact, memory: Artifact) -> str | None:
    """Why a memory trained without targets is not a valid control of the memory; None if it is."""
    if memory.is_imported:
        return "the memory's training settings are unknown"
    if "start" in memory.inputs:
        return "starts from a memory that may have been trained on the targets, as the memory does"
    training = {**memory.config["training"], "alpha": 0.0}
    if control.config != {**memory.config, "training": training} or control.inputs != memory.inputs:
        return "was trained with different settings or inputs than the memory"
    if control.summary["steps"] != memory.summary["steps"]:
        return f"was trained for {control.summary['steps']} steps, the memory for {memory.summary['steps']}"
    return None
