"""Parameters of a model on disk: an Orbax folder inside an artifact, with a fingerprint of every bit."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from mlpmem_jax.core import storage
from mlpmem_jax.core.artifacts import Artifact
from mlpmem_jax.core.errors import ArtifactError, UserError
from mlpmem_jax.core.sharding import placed_shapes

_FOLDER = "parameters"


@jax.jit
def _bit_sums(tree):
    """Two 32-bit sums over the bits of each array, weighted by position; exact in any order, hence on any mesh."""

    def sums(array):
        bits = jax.lax.bitcast_convert_type(array.astype(jnp.float32), jnp.uint32)
        index = jnp.arange(bits.size, dtype=jnp.uint32).reshape(bits.shape)
        first = jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)
        second = jnp.sum((bits ^ (bits >> 15)) * (index * jnp.uint32(2654435761) | 1), dtype=jnp.uint32)
        return jnp.stack([first, second])

    return jax.tree.map(sums, tree)


def fingerprint(parameters) -> str:
    """A fingerprint of all parameters, computed without gathering them on one host."""
    sums = jax.tree_util.tree_leaves_with_path(_bit_sums(parameters))
    digest = hashlib.sha256()
    for path, value in sums:
        digest.update(f"{jax.tree_util.keystr(path)} {int(value[0]):08x} {int(value[1]):08x}\n".encode())
    return digest.hexdigest()


def write(path, parameters) -> None:
    """Writes float32 parameters to the artifact's folder; each process writes its own shards."""
    folder = storage.literal(path) / _FOLDER
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, parameters, force=True)


@contextlib.contextmanager
def reading(path, remedy: str) -> Iterator[None]:
    """Within the context, converts the many kinds of errors that Orbax raises for damaged files to ArtifactError.

    Args:
      path: the path being read.
      remedy: what the user can do about it.

    Raises:
      ArtifactError: names path, cause and remedy.
    """
    try:
        yield
    except (UserError, jax.errors.JaxRuntimeError):  # insufficient memory, or another process was lost
        raise
    except Exception as error:
        cause = str(error).split(" [source locations")[0].strip().partition("\n")[0][:300] or type(error).__name__
        raise ArtifactError(f"{path}: could not be read: {cause}; {remedy}") from error


def read(artifact: Artifact, abstract, shardings):
    """Reads the parameters of a sealed artifact straight into sharded arrays.

    Args:
      artifact: an artifact of kind "base" or "memory"; its summary has the fingerprint.
      abstract: tree of jax.ShapeDtypeStruct, according to the model's config.
      shardings: tree of NamedSharding of the same structure.

    Raises:
      ArtifactError: they are missing, have other shapes, or differ from what was sealed.
    """
    folder = storage.literal(artifact.path) / _FOLDER
    remedy = f"delete {artifact.path} and run its stage again"
    with reading(folder, remedy), ocp.StandardCheckpointer() as checkpointer:
        parameters = checkpointer.restore(folder, placed_shapes(abstract, shardings))
    if fingerprint(parameters) != artifact.summary["parameters_fingerprint"]:
        raise ArtifactError(f"{folder}: parameters are not those that were sealed; {remedy}")
    return parameters
