"""Builds ScaNN indices as the files that ScaNN loads.

ScaNN trains clusters and hashes on a sample. Assigning every key to its cluster and hash is most of the work if there
are many keys; this module does it with JAX and writes the files that ScaNN loads. Keys are processed in blocks, so a
build needs no more memory than the resulting index.

Hashes have one scale for all keys and dimensions, which a few keys of much larger norm would dominate. So keys must be
centered on 0, and clusters and hashes are computed from keys with capped norms; candidates are reordered by the
distances of the original keys.

Two builds from the same keys are byte-for-byte identical. ScaNN does not guarantee that: it takes random seeds from the
operating system, so clusters are seeded here by k-means++; and its threads give slightly different results from run to
run, so training uses one thread. Searches may use any number.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
import pathlib
import re
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mlpmem_jax.core import native_output

_BRUTE_FORCE_BELOW = 4096  # too few keys to cluster and hash well
# More iterations of ScaNN's training than these did not change the recall.
_TREE_ITERATIONS, _HASHING_ITERATIONS, HASHING_SAMPLE = 6, 5, 25_000
_CAP = 2.0  # norms above this multiple of the sample's median are capped for clustering and hashing
_SMALLEST_LEAF = 4  # sample keys; ScaNN's 50 drops leaves if the sample has fewer than about 100 keys per leaf
_KEYS_PER_BLOCK = 8192
_REREAD_COST = 2  # cost of a random read relative to a sequential one
# ScaNN's names for sets of instructions, and what each needs of a processor, in the words of /proc/cpuinfo.
_INSTRUCTIONS = {"avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512dq", "avx512bw"}}


@functools.cache
def scann():
    """ScaNN's Python module; imported lazily, because it is not available on every platform."""
    from scann import scann_ops_pybind

    use_instructions(available_instructions())
    return scann_ops_pybind


def available_instructions() -> set[str]:
    """Those of ScaNN's sets of instructions, "avx2" and "avx512", that this processor has."""
    flags = re.search(r"^flags\s*:(.*)$", pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    has = set(flags[1].split()) if flags else set()
    return {name for name, needed in _INSTRUCTIONS.items() if needed <= has}


def use_instructions(names: set[str]) -> None:
    """Makes ScaNN use some of its sets of instructions, in indices that are built or loaded from now on.

    The wheels on PyPI (1.4.2) look for none: what looks for them is compiled only where macros of TensorFlow are
    defined. So they search with SSE4 on every processor, at half the rate. Versions without these variables are left as
    they are.
    """
    from scann import scann_ops_pybind

    loaded = ctypes.CDLL(scann_ops_pybind.scann_pybind.__file__)
    for name in _INSTRUCTIONS:
        variable = f"should_use_{name}"
        try:
            chosen = ctypes.c_bool.in_dll(loaded, f"_ZN14research_scann14flags_internal{len(variable)}{variable}E")
        except ValueError:  # another version
            return
        chosen.value = name in names


@dataclasses.dataclass(frozen=True)
class Options:
    """How an index is built and searched.

    Attributes:
      leaves: number of clusters.
      leaves_to_search: number of nearest clusters that each query searches.
      reorder: candidates per neighbor whose distance is computed exactly.
      training_sample: number of keys on which clusters and hashes are trained.
    """

    leaves: int
    leaves_to_search: int
    reorder: float
    training_sample: int

    @classmethod
    def derive(cls, num_keys: int, k: int, leaves=0, leaves_to_search=0, reorder=0, training_sample=100_000):
        """Derives options from the number of keys and neighbors; arguments other than 0 are used as given.

        The derived options were measured to give a recall of at least 0.95 on keys of small language models; keys that
        are less clustered need more leaves.

        Args:
          num_keys: N.
          k: neighbors per query.
          leaves, leaves_to_search, training_sample: as in the attributes.
          reorder: candidates per query whose distance is computed exactly, for k neighbors.
        """
        leaves = min(leaves or round(math.sqrt(num_keys)), num_keys)
        # The ball that contains k neighbors touches more leaves as it grows, but less than proportionally.
        touched = math.ceil(40 * (k * leaves / num_keys) ** 0.4)
        return cls(
            leaves=leaves,
            leaves_to_search=min(leaves_to_search or touched, leaves),
            reorder=round(reorder / k if reorder else 1 + 9 / math.sqrt(k), 2),
            training_sample=min(max(training_sample, leaves), num_keys),
        )

    def summary(self) -> dict[str, float]:
        return {"leaves_to_search": self.leaves_to_search, "reorder": self.reorder}

    def cost(self, size: int, width: int, k: int) -> int:
        """Bytes that one query reads: all centers, the hashes of the searched leaves, and the reordered keys."""
        hashes = size * self.leaves_to_search // self.leaves * width
        candidates = min(round(k * self.reorder), size)
        return 4 * self.leaves * width + hashes + 4 * _REREAD_COST * candidates * width

    def __str__(self) -> str:
        return f"{self.leaves_to_search} of {self.leaves} leaves, {self.reorder:g} candidates per neighbor"


def write(folder, size: int, width: int, read: Callable[[int, int], np.ndarray], options: Options) -> None:
    """Builds an index as files in an existing empty local folder, for `scann_backend.ScannIndex.load`.

    Files are read and written sequentially and never memory-mapped, because mapped pages count as process memory.

    Args:
      size: N.
      width: D.
      read: function of (start, stop) that returns keys, float32 [stop - start, D], centered on 0.
    """
    folder = pathlib.Path(folder)
    if size < _BRUTE_FORCE_BELOW:
        _save(scann().builder(np.ascontiguousarray(read(0, size)), 1, "squared_l2").score_brute_force(), folder)
        return
    blocks = [slice(start, min(start + _KEYS_PER_BLOCK, size)) for start in range(0, size, _KEYS_PER_BLOCK)]
    # Random, because evenly spaced keys could all be at the same position of their sequences.
    sample_N = np.sort(np.random.default_rng(0).choice(size, options.training_sample, replace=False))
    sample_NxD = np.empty((len(sample_N), width), np.float32)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        keys_file, codes_file = (pathlib.Path(unfinished) / name for name in ("dataset.npy", "hashed_dataset.npy"))
        with open(keys_file, "wb") as file:
            _write_header(file, (size, width), np.float32)
            for block in blocks:
                keys_BxD = np.ascontiguousarray(read(block.start, block.stop), np.float32)
                keys_BxD.tofile(file)
                first, last = np.searchsorted(sample_N, [block.start, block.stop])
                sample_NxD[first:last] = keys_BxD[sample_N[first:last] - block.start]
        cap = _CAP * float(np.median(np.linalg.norm(sample_NxD, axis=1)))
        _train(capped(sample_NxD, cap), options, folder)
        del sample_NxD
        centers_UxD, leaves_U, codebook_Dx16 = _trained(folder)
        leaf_N = np.empty(size, np.int32)
        with open(keys_file, "rb") as source, open(codes_file, "wb") as file:
            np.lib.format.read_magic(source)
            np.lib.format.read_array_header_1_0(source)
            _write_header(file, (size, width), np.uint8)
            for block in blocks:
                rows = block.stop - block.start
                keys_BxD = np.zeros((_KEYS_PER_BLOCK, width), np.float32)  # one shape, one compilation
                keys_BxD[:rows] = capped(np.fromfile(source, np.float32, rows * width).reshape(rows, width), cap)
                nearest_B, codes_BxD = _fill(keys_BxD, centers_UxD, codebook_Dx16)
                leaf_N[block] = leaves_U[np.asarray(nearest_B)[:rows]]
                np.asarray(codes_BxD)[:rows].tofile(file)
        np.save(folder / "datapoint_to_token.npy", leaf_N)
        for file in (keys_file, codes_file):
            file.replace(folder / file.name)


def _write_header(file, shape: tuple[int, ...], dtype) -> None:
    description = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(file, {"descr": description, "fortran_order": False, "shape": shape})


def capped(keys_NxD: np.ndarray, cap: float) -> np.ndarray:
    """Scales keys down to norms of at most `cap`, float32 [N, D]."""
    norms_Nx1 = np.linalg.norm(keys_NxD, axis=1, keepdims=True)
    return keys_NxD * np.minimum(1, cap / np.maximum(norms_Nx1, np.finfo(np.float32).tiny)).astype(np.float32)


def _train(keys_NxD: np.ndarray, options: Options, folder: pathlib.Path) -> None:
    """Writes the index that ScaNN builds from a sample, float32 [N, D]."""
    builder = (
        scann()
        .builder(keys_NxD, 1, "squared_l2")
        .tree(
            options.leaves,
            options.leaves_to_search,
            training_sample_size=len(keys_NxD),
            training_iterations=_TREE_ITERATIONS,
            min_partition_size=_SMALLEST_LEAF,
            random_init=False,
        )
    )
    # One dimension per block: more bytes to scan than with two, but far fewer candidates to reorder at equal recall.
    builder = builder.score_ah(
        1, training_sample_size=min(HASHING_SAMPLE, len(keys_NxD)), training_iterations=_HASHING_ITERATIONS
    )
    _save(builder.reorder(1), folder)


def _save(builder, folder: pathlib.Path) -> None:
    builder.set_n_training_threads(1)
    with native_output.silenced_standard_error():
        builder.build().serialize(str(folder), relative_path=True)


def _trained(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What ScaNN wrote: (cluster centers [U, D], their numbers int32 [U], hash centers [D, 16])."""
    from scann.partitioning import partitioner_pb2
    from scann.proto import centers_pb2

    root = partitioner_pb2.SerializedPartitioner.FromString((folder / "serialized_partitioner.pb").read_bytes())
    root = root.kmeans.kmeans_tree.root
    codebook = centers_pb2.CentersForAllSubspaces.FromString((folder / "ah_codebook.pb").read_bytes())
    return (
        np.array([center.dimension for center in root.centers], np.float32),
        np.array([child.leaf_id for child in root.children], np.int32),
        np.array([[c.feature_value_float[0] for c in space.center] for space in codebook.subspace_centers], np.float32),
    )


@jax.jit
def _fill(keys_BxD, centers_UxD, codebook_Dx16):
    """(nearest cluster of each key, int32 [B]; nearest hash center of each of its numbers, uint8 [B, D])."""
    products_BxU = jnp.matmul(keys_BxD, centers_UxD.T, precision=jax.lax.Precision.HIGHEST)
    nearest_B = jnp.argmin(jnp.sum(centers_UxD**2, axis=1) - 2 * products_BxU, axis=1)
    order_Dx16 = jnp.argsort(codebook_Dx16, axis=1)
    ascending_Dx16 = jnp.take_along_axis(codebook_Dx16, order_Dx16, axis=1)
    codes_BxD = jnp.broadcast_to(order_Dx16[:, 0], keys_BxD.shape)
    for center in range(1, codebook_Dx16.shape[1]):
        is_past_BxD = keys_BxD > (ascending_Dx16[:, center - 1] + ascending_Dx16[:, center]) / 2
        codes_BxD = jnp.where(is_past_BxD, order_Dx16[:, center], codes_BxD)
    return nearest_B, codes_BxD.astype(jnp.uint8)
