"""Where a report's metrics come from: costs of the stages, training curves, sizes, versions, fingerprints."""

from __future__ import annotations

import platform

import jax
from etils import epath

from mlpmem_jax.core import json_lines, storage
from mlpmem_jax.core.artifacts import Artifact, library_versions

CURVE_RECORDS = 400
"""Maximum records of a training curve in a report; more than a plot can show."""

_LIBRARIES = (
    "jax",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorstore",
    "grain",
    "scann",
    "tokenizers",
    "numpy",
    "scipy",
)
_TRAINED = ("base", "memory")


def training_curves(workdir) -> dict[str, list[dict]]:
    """Records of the base's and the memory's training, thinned evenly, with all validations kept."""
    curves = {name: json_lines.read(epath.Path(workdir) / name / "metrics.jsonl") for name in _TRAINED}
    return {name: _thinned([record for record in curve if _is_whole(record)]) for name, curve in curves.items()}


def _is_whole(record: dict) -> bool:
    """Whether a record, which may have been edited, is as `MetricsWriter` writes it."""
    return "step" in record and all(isinstance(value, int | float) for value in record.values())


def _thinned(curve: list[dict]) -> list[dict]:
    stride = -(-len(curve) // CURVE_RECORDS)
    return [
        record
        for index, record in enumerate(curve)
        if (len(curve) - 1 - index) % stride == 0 or any(name.startswith("validation/") for name in record)
    ]


def artifact_bytes(artifact: Artifact) -> int:
    """Bytes on disk; for a trained model, of its parameters only, without checkpoints and logs."""
    if artifact.kind not in _TRAINED:
        return artifact.bytes_on_disk
    return storage.folder_bytes(epath.Path(artifact.path) / "parameters")


def environment(artifacts: dict[str, Artifact]) -> dict:
    """Versions, devices, and the fingerprint of every artifact that the metrics depend on."""
    devices = jax.devices()
    return {
        "libraries": library_versions(("mlpmem_jax", *_LIBRARIES)),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "fingerprints": {name: artifact.fingerprint for name, artifact in artifacts.items()},
    }
