"""The train state: created directly on the mesh, and checkpointed with Orbax."""

from __future__ import annotations

import hashlib
import zlib

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from mlpmem_jax.core import parameters as stored
from mlpmem_jax.core import storage
from mlpmem_jax.core.errors import ArtifactError
from mlpmem_jax.core.manifests import encode
from mlpmem_jax.core.sharding import Sharding

METRIC = "perplexity"
"""The validation metric that determines the best checkpoint; lower is better."""

_CHECKSUM = "crc32"  # key of the checksum of the other metrics


def state_shardings(sharding: Sharding, abstract_state, parameter_shardings):
    """Shardings of a complete train state.

    A leaf of the optimizer state whose path ends like a parameter's and whose shape is the same (moments, momentum) is
    sharded like that parameter; every other leaf (step counts) is replicated.
    """
    placed = {
        jax.tree_util.keystr(path): value for path, value in jax.tree_util.tree_leaves_with_path(parameter_shardings)
    }
    shapes = {
        jax.tree_util.keystr(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_state["parameters"])
    }
    replicated = sharding.named()

    def place(path, leaf):
        for start in range(len(path)):
            name = jax.tree_util.keystr(path[start:])
            if shapes.get(name) == leaf.shape:
                return placed[name]
        return replicated

    return jax.tree_util.tree_map_with_path(place, abstract_state)


def _fingerprint(state, next_sequence: int) -> str:
    return hashlib.sha256(f"{stored.fingerprint(state)} {next_sequence}".encode()).hexdigest()


def initial_state(parameters, optimizer: optax.GradientTransformation) -> dict:
    """The state of a training that starts from these parameters; jit it with `state_shardings` as out_shardings."""
    return {"parameters": parameters, "optimizer": optimizer.init(parameters), "step": jnp.zeros((), jnp.int32)}


class Checkpoints:
    """The checkpoints of one run: the latest, to resume from, and the best by validation perplexity."""

    def __init__(self, folder):
        """Opens the checkpoints in FOLDER/checkpoints.

        Raises:
          ArtifactError: they cannot be read.
        """
        self._folder = storage.literal(folder) / "checkpoints"
        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(n=1),
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: metrics[METRIC],
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=lambda metrics: metrics[METRIC],
            best_mode="min",
            cleanup_tmp_directories=True,
        )
        with stored.reading(self._folder, "delete that folder to train from the start"):
            self._manager = ocp.CheckpointManager(self._folder, options=options)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state, next_sequence: int, validation: dict[str, float] | None) -> None:
        """Starts an asynchronous save; `validation` has the metric `METRIC`, or is None if it was not measured."""
        if step in self._manager.all_steps():
            return
        data = {"next_sequence": next_sequence, "fingerprint": _fingerprint(state, next_sequence)}
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
        metrics = validation and {**validation, _CHECKSUM: float(zlib.crc32(encode(validation)))}
        self._manager.save(step, args=arguments, metrics=metrics, force=True)

    def restore(self, step: int, abstract_state) -> tuple[dict, int]:
        """The state at `step`, with the shardings of `abstract_state`, and the data position.

        Raises:
          ArtifactError: it cannot be read, or differs from what was saved.
        """
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore())
        folder = self._folder / str(step)
        remedy = f"delete {folder} to resume from the previous checkpoint, or from the start"
        with stored.reading(folder, remedy):
            restored = self._manager.restore(step, args=arguments)
            state, data = restored["state"], restored["data"]
            next_sequence = int(data["next_sequence"])
            if _fingerprint(state, next_sequence) != data["fingerprint"]:
                raise ArtifactError(f"{folder}: the state differs from the one that was saved; {remedy}")
            return state, next_sequence

    def best_step(self) -> int | None:
        """The step with the lowest validation perplexity.

        Raises:
          ArtifactError: the metrics of a checkpoint differ from those that were saved.
        """
        for step in self._manager.all_steps():
            self.validation(step)
        return self._manager.best_step()

    def validation(self, step: int) -> dict[str, float]:
        """The metrics on the validation split at `step`; empty if there was no validation.

        Raises:
          ArtifactError: they differ from what was saved.
        """
        folder = self._folder / str(step)
        remedy = f"delete {folder} to resume from the previous checkpoint, or from the start"
        with stored.reading(folder, remedy):
            metrics = dict(self._manager.metrics(step) or {})
            checksum = metrics.pop(_CHECKSUM, None)
            if metrics and zlib.crc32(encode(metrics)) != checksum:
                raise ArtifactError(f"{folder}: its validation metrics differ from those that were saved; {remedy}")
            return metrics

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()
