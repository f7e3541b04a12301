"""Where a report's metrics come from: what the stages cost, how training went, sizes, versions, fingerprints."""

from __future__ import annotations

import platform

import jax
from etils import epath

from mlpmem_jax.core import json_lines, storage
from mlpmem_jax.core.artifacts import Artifact, library_versions

CURVE_RECORDS = 400
"""Records of a training curve that a report keeps; more than a picture can show."""

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
    """Records of the base's and the memory's training, thinned evenly; validations are all kept."""
    curves = {name: json_lines.read(epath.Path(workdir) / name / "metrics.jsonl") for name in _TRAINED}
    return {name: _thinned(curve) for name, curve in curves.items()}


def _thinned(curve: list[dict]) -> list[dict]:
    stride = -(-len(curve) // CURVE_RECORDS)
    return [
        record
        for index, record in enumerate(curve)
        if (len(curve) - 1 - index) % stride == 0 or any(name.startswith("validation/") for name in record)
    ]


def artifact_bytes(artifact: Artifact) -> int:
    """Bytes on disk; of a trained model those of its parameters, without checkpoints and logs."""
    if artifact.kind not in _TRAINED:
        return artifact.bytes_on_disk
    return storage.folder_bytes(epath.Path(artifact.path) / "parameters")


def environment(artifacts: dict[str, Artifact]) -> dict:
    """Versions, devices, and the fingerprint of every artifact that the metrics rest on."""
    devices = jax.devices()
    return {
        "libraries": library_versions(("mlpmem_jax", *_LIBRARIES)),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "fingerprints": {name: artifact.fingerprint for name, artifact in artifacts.items()},
    }
