"""Projections that are searched instead of the keys: centered and rotated, in all dimensions or fewer.

Keys of real language models are far from isotropic. At attention sinks, one number in hundreds may be a hundred times
larger than the rest, and means are far from 0. Quantizers with one scale for all dimensions then lose everything else.
Centering and a random rotation spread large values over all dimensions and preserve every distance.

Projecting to fewer dimensions (principal components) does not preserve distances: an index over them returns more than
k candidates, whose distances to the query are recomputed from whole keys. Only neighbors that are not among the
candidates are lost.
"""

from __future__ import annotations

import dataclasses
import io

import numpy as np
from etils import epath

from mlpmem_jax.retrieval import neighbors
from mlpmem_jax.retrieval.backends import Effort, Index
from mlpmem_jax.retrieval.chunks import in_chunks
from mlpmem_jax.retrieval.scratch import write_whole

_CANDIDATES = 1.5  # candidates per neighbor


@dataclasses.dataclass(frozen=True)
class Projection:
    """An affine map that preserves distances, or projects onto a subspace.

    Attributes:
      mean_D: float32 [D], mean of the sample.
      basis_DxO: float32 [D, O], orthonormal columns.
      variance_kept: share of the sample's variance that the columns span; 1 if O = D.
    """

    mean_D: np.ndarray
    basis_DxO: np.ndarray
    variance_kept: float

    def __call__(self, keys_NxD: np.ndarray) -> np.ndarray:
        """float32 [N, O]."""
        return (keys_NxD.astype(np.float32) - self.mean_D) @ self.basis_DxO

    def save(self, file: epath.Path) -> None:
        """Writes the projection atomically."""
        content = io.BytesIO()
        np.save(content, np.concatenate([self.mean_D[:, None], self.basis_DxO], axis=1))
        np.save(content, np.float64(self.variance_kept))
        write_whole(file, content.getvalue())

    @classmethod
    def load(cls, file: epath.Path) -> Projection:
        """Reads what `save` wrote."""
        content = io.BytesIO(file.read_bytes())
        columns_DxO1 = np.load(content)
        return cls(columns_DxO1[:, 0], np.ascontiguousarray(columns_DxO1[:, 1:]), float(np.load(content)))


def fit(sample_NxD: np.ndarray, dimensions: int) -> Projection:
    """Centers on the mean of a sample, projects on its principal components if O < D, and rotates at random.

    Args:
      sample_NxD: keys, float [N, D].
      dimensions: O, at most D.
    """
    sample_NxD = sample_NxD.astype(np.float32)
    mean_D = sample_NxD.mean(axis=0, dtype=np.float64).astype(np.float32)
    basis_DxO, kept = rotation(dimensions), 1.0
    if dimensions < len(mean_D):
        centered_NxD = sample_NxD - mean_D
        variances_D, vectors_DxD = np.linalg.eigh((centered_NxD.T @ centered_NxD).astype(np.float64))  # ascending
        basis_DxO = vectors_DxD[:, ::-1][:, :dimensions] @ basis_DxO
        kept = variances_D[::-1][:dimensions].sum() / max(variances_D.sum(), np.finfo(np.float64).tiny)
    return Projection(mean_D, np.ascontiguousarray(basis_DxO, np.float32), float(kept))


def rotation(dimensions: int) -> np.ndarray:
    """A random orthogonal matrix, float64 [O, O], drawn uniformly from all of them; the same at every call."""
    gaussian_OxO = np.random.default_rng(0).standard_normal((dimensions, dimensions))
    orthogonal_OxO, triangular_OxO = np.linalg.qr(gaussian_OxO)
    return orthogonal_OxO * np.sign(np.diag(triangular_OxO))


def candidates(k: int) -> int:
    """The number of candidates that are compared in all dimensions for k neighbors."""
    return round(_CANDIDATES * k)


def widened(rows_NxD: np.ndarray) -> np.ndarray:
    """Converts finite rows exactly to float32. NumPy's own conversion of float16 is not vectorized."""
    if rows_NxD.dtype != np.float16:
        return rows_NxD.astype(np.float32)
    bits_NxD = rows_NxD.view(np.int16).astype(np.int32)  # the sign stays in front
    bits_NxD <<= 13
    bits_NxD &= np.int32(-0x70002000)  # sign, five bits of exponent, ten of mantissa, where float32 has them
    values_NxD = bits_NxD.view(np.float32)
    values_NxD *= np.float32(2.0**112)  # the exponents' biases are 15 and 127
    return values_NxD


def squared_distances(queries_QxD: np.ndarray, keys_NxD: np.ndarray, ids_QxJ: np.ndarray) -> np.ndarray:
    """|q - x|^2 of each query to the keys with its ids, float32 [Q, J]; infinite where the id is MISSING."""
    distances_QxJ = np.empty(ids_QxJ.shape, np.float32)
    for query_D, ids_J, distances_J in zip(queries_QxD.astype(np.float32), ids_QxJ, distances_QxJ, strict=True):
        differences_JxD = widened(keys_NxD.take(ids_J, axis=0))
        differences_JxD -= query_D
        np.einsum("cd,cd->c", differences_JxD, differences_JxD, out=distances_J)
    distances_QxJ[ids_QxJ == neighbors.MISSING] = np.inf
    return distances_QxJ


class RotatedIndex:
    """An index over a distance-preserving projection of the keys, which takes whole keys as queries."""

    def __init__(self, index: Index, projection: Projection):
        """index: index over `projection(keys_NxD)`."""
        self._index, self._projection = index, projection

    def search(
        self,
        queries_QxD: np.ndarray,
        k: int,
        excluded_Qx2: np.ndarray | None = None,
        effort: Effort | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `backends.Index.search`."""
        return self._index.search(self._projection(queries_QxD), k, excluded_Qx2, effort)


class ReducedIndex:
    """Takes candidates from an index over reduced keys and computes distances from whole keys."""

    def __init__(self, index: Index, projection: Projection, keys_NxD: np.ndarray):
        """index: index over `projection(keys_NxD)`; keys_NxD: float [N, D], as stored in the datastore."""
        self._index, self._projection, self._keys_NxD = index, projection, keys_NxD

    def search(
        self,
        queries_QxD: np.ndarray,
        k: int,
        excluded_Qx2: np.ndarray | None = None,
        effort: Effort | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest of the candidates, as `backends.Index.search`."""
        _, ids_QxJ = self._index.search(self._projection(queries_QxD), candidates(k), excluded_Qx2, effort)

        def nearest(part: slice) -> np.ndarray:
            distances_QxJ = squared_distances(queries_QxD[part], self._keys_NxD, ids_QxJ[part])
            return neighbors.smallest(neighbors.pack(distances_QxJ, ids_QxJ[part]), k)

        parts = in_chunks(nearest, len(queries_QxD), candidates(k))
        return neighbors.unpack(np.concatenate([np.empty((0, k), np.uint64), *parts]))
