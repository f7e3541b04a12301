"""Datastores made of a Gaussian mixture, for the tests of retrieval."""

import jax
import numpy as np
import workdirs

from configs import default
from mlpmem_jax.core.artifacts import ArraySpec, ArtifactWriter
from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.retrieval.backends import KeySource
from mlpmem_jax.retrieval.exact_backend import ExactIndex

LENGTH, WIDTH, VOCABULARY, PER_SHARD = 16, 8, 50, 4


def mixture(rng, count, clusters=20, spread=0.3):
    centers_UxD = rng.normal(size=(clusters, WIDTH))
    return centers_UxD[rng.integers(clusters, size=count)] + spread * rng.normal(size=(count, WIDTH))


def write_tokens(workdir):
    """Tokens of which only the dtype is read."""
    writer = ArtifactWriter.create(
        workdir / "tokens", "tokens", {}, {}, {"train": ArraySpec((1, 8), "uint16", 1, (1, 8))}
    )
    writer.write_shard(0, {"train": np.zeros((1, 0), np.uint16)})
    writer.seal({})


def write_datastore(path, rng, sequences, scored, document_length=23):
    """A sealed datastore; documents of `document_length` positions."""
    positions = sequences * LENGTH
    keys = mixture(np.random.default_rng(5), positions).astype(np.float16)
    keys = keys[rng.permutation(positions)].reshape(sequences, LENGTH, WIDTH)
    arrays = {
        "keys": keys,
        "next_tokens": rng.integers(VOCABULARY, size=(sequences, LENGTH)).astype(np.int32),
        "documents": (np.arange(positions) // document_length).reshape(sequences, LENGTH).astype(np.int32),
    }
    if scored:
        arrays["base_log_probabilities"] = np.log(rng.uniform(0.01, 0.5, (sequences, LENGTH))).astype(np.float32)
    workdirs.write_datastore(path, arrays)
    return arrays


def write_workdir(workdir, sequences=40, document_length=23):
    """Tokens (empty) and the datastores of all splits; returns their arrays by split."""
    write_tokens(workdir)
    rng = np.random.default_rng(0)
    return {
        "train": write_datastore(workdir / "datastore" / "train", rng, sequences, False, document_length),
        "validation": write_datastore(workdir / "datastore" / "validation", rng, 6, True),
        "test": write_datastore(workdir / "datastore" / "test", rng, 5, True),
    }


def config_for(workdir, **targets):
    config = default.get_config()
    config.workdir = str(workdir)
    config.targets.update({"k": 12, "temperature": 0.5, "quality_positions": 64, **targets})
    return config


def forbidden(excluded_Qx2, count):
    """Which keys each query may not retrieve: bool [Q, count]."""
    ids = np.arange(count)
    return (ids >= excluded_Qx2[:, :1]) & (ids < excluded_Qx2[:, 1:])


def brute_force(queries_QxD, keys_NxD, k, forbidden_QxN=None):
    """(squared distances float64 [Q, k], ids [Q, k]) by the definition."""
    distances_QxN = np.array([np.sum((keys_NxD - query) ** 2, axis=1) for query in queries_QxD.astype(float)])
    if forbidden_QxN is not None:
        distances_QxN[forbidden_QxN] = np.inf
    ids_QxK = np.argsort(distances_QxN, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances_QxN, ids_QxK, axis=1), ids_QxK


def knn_distribution(distances_K, tokens_K, temperature):
    """p_kNN as a dictionary, from the paper's sum over neighbors."""
    masses, nearest = {}, min(distances_K)  # a common factor, so that no sum is 0 / 0
    for distance, token in zip(distances_K, tokens_K, strict=True):
        if np.isfinite(distance):
            masses[int(token)] = masses.get(int(token), 0.0) + np.exp((nearest - distance) / temperature)
    total = sum(masses.values())
    return {token: mass / total for token, mass in masses.items()}


def exact_index(keys_NxD, shape=(1, -1, 1), dtype="float32", recall_target=1.0, devices=1):
    """An index of keys that are in memory, over a mesh of so many devices."""
    mesh = make_mesh(*shape, jax.devices()[:devices])
    source = KeySource(*keys_NxD.shape, dtype, lambda start, stop: keys_NxD[start:stop])
    return ExactIndex(source, mesh, recall_target)
