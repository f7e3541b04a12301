"""The artifact of stage `targets`: names, shapes and dtypes of its arrays, and how they are read and written.

Only this module knows this format.

    offsets              int32 [sequences, T + 1]   start of each position's entries within the shard
    token_ids            uint16 or int32, ragged    one entry per token with nonzero probability, most probable first
    probabilities        float16, ragged            in the same order
    label_probabilities  float32 [sequences, T]     p_kNN(next token)

Shards have the same sequences as those of the datastore.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from mlpmem_jax.core.artifacts import ArraySpec, Artifact, ArtifactWriter, open_artifact
from mlpmem_jax.core.errors import ConfigError, UserError
from mlpmem_jax.retrieval.distribution import SparseDistributions

KIND = "targets"
SMALLEST_PROBABILITY = 2.0**-25  # float16 rounds this and smaller values to zero
_ENTRIES_PER_CHUNK = 8192  # entries per range read


def folder_of(workdir, split: str) -> epath.Path:
    """The folder of the targets of a split."""
    return epath.Path(workdir) / KIND / split


def array_specs(datastore: Artifact, token_dtype: str, entries: int) -> dict[str, ArraySpec]:
    """The arrays of the targets of one split.

    Args:
      datastore: the datastore of the split.
      token_dtype: dtype of the stored tokens.
      entries: maximum entries per position.

    Raises:
      ConfigError: a shard may need more entries than an int32 can count.
    """
    spec = datastore.arrays["next_tokens"]
    (sequences, length), per_shard = spec.shape, spec.rows_per_shard
    capacity = -(-per_shard * length * entries // _ENTRIES_PER_CHUNK) * _ENTRIES_PER_CHUNK
    if capacity > np.iinfo(np.int32).max:
        raise ConfigError(
            f"config.datastore.sequences_per_shard: {per_shard} sequences of {length} positions with up to {entries} "
            "entries each are too many for one shard; lower it, or config.targets.keep"
        )

    def ragged(dtype: str) -> ArraySpec:
        return ArraySpec((spec.num_shards, capacity), dtype, 1, (1, _ENTRIES_PER_CHUNK))

    return {
        "offsets": ArraySpec((sequences, length + 1), "int32", per_shard, (1, length + 1)),
        "token_ids": ragged("uint16" if token_dtype == "uint16" else "int32"),
        "probabilities": ragged("float16"),
        "label_probabilities": ArraySpec((sequences, length), "float32", per_shard, (1, length)),
    }


def token_dtype(vocab_size: int) -> str:
    """The dtype of stored tokens."""
    return "uint16" if vocab_size <= 2**16 else "int32"


class TargetsReader:
    """The targets of one split, open for reading."""

    def __init__(self, artifact: Artifact):
        self.artifact = artifact
        spec = artifact.arrays["offsets"]
        self.num_sequences, self.length = spec.shape[0], spec.shape[1] - 1
        self.sequences_per_shard = spec.rows_per_shard

    @classmethod
    def open(cls, workdir, split: str) -> TargetsReader:
        """Opens the finished targets of a split.

        Raises:
          ArtifactError: they do not exist or cannot be read.
        """
        return cls(open_artifact(folder_of(workdir, split), KIND))

    @property
    def max_entries(self) -> int:
        """The largest number of entries of any position."""
        return self.artifact.summary["max_entries"]

    def shards(self) -> list[tuple[int, int]]:
        """(first sequence, number of sequences) of every shard."""
        starts = range(0, self.num_sequences, self.sequences_per_shard)
        return [(first, min(self.sequences_per_shard, self.num_sequences - first)) for first in starts]

    def read(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The distributions of N positions, from sequences of one shard.

        Args:
          first, stop: range of sequences.

        Returns:
          (offsets int64 [N + 1], token ids [M], probabilities float16 [M]) as stored: the entries of position
          n are `offsets[n]:offsets[n + 1]`, most probable first.

        Raises:
          ArtifactError: the stored bytes do not match their checksum.
        """
        offsets_SxT1 = self.artifact.read("offsets", first, stop)
        shard, begin, end = first // self.sequences_per_shard, int(offsets_SxT1[0, 0]), int(offsets_SxT1[-1, -1])
        offsets_N1 = np.append(offsets_SxT1[:, :-1], end).astype(np.int64) - begin
        token_ids_M = self.artifact.read_ragged("token_ids", shard, begin, end)
        return offsets_N1, token_ids_M, self.artifact.read_ragged("probabilities", shard, begin, end)

    def read_sequences(self, sequences_S: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The distributions of whole sequences in any order, all read at the same time.

        Returns:
          (number of entries of each position int32 [S, T], token ids [M], probabilities float16 [M]), the entries of
          all positions in order.

        Raises:
          ArtifactError: the stored bytes do not match their checksum.
        """
        offsets_SxT1 = self.artifact.read_rows("offsets", sequences_S)
        shards_S = sequences_S // self.sequences_per_shard
        ranges = list(zip(shards_S.tolist(), offsets_SxT1[:, 0].tolist(), offsets_SxT1[:, -1].tolist(), strict=True))
        entries = (np.concatenate(self.artifact.read_ranges(name, ranges)) for name in ("token_ids", "probabilities"))
        return np.diff(offsets_SxT1), *entries

    def label_probabilities(self, first: int, stop: int) -> np.ndarray:
        """p_kNN(next token) of the sequences `first` to `stop`, float32 [S, T]."""
        return self.artifact.read("label_probabilities", first, stop)


class TargetsWriter:
    """Writes the targets of one split, or resumes an unfinished write."""

    def __init__(self, folder: epath.Path, settings: Mapping, inputs: Mapping, specs: Mapping[str, ArraySpec]):
        """Starts the artifact, or opens an unfinished one with the same settings.

        Args:
          folder: the split's folder, from `folder_of`.
          settings: the settings that the content depends on.
          inputs: fingerprints of the artifacts it is built from, by name.
          specs: from `array_specs`.

        Raises:
          ArtifactError: the folder contains something else, or was written with other settings.
        """
        self._writer = ArtifactWriter.create(folder, KIND, settings, inputs, specs)
        self._folder, self._token_dtype = folder, specs["token_ids"].dtype
        self.num_sequences, self.length = specs["label_probabilities"].shape

    def incomplete_shards(self) -> list[int]:
        """Indices of the shards that are not yet written, in order."""
        return self._writer.incomplete_shards()

    def write_shard(self, shard: int, parts: Sequence[SparseDistributions], lacking: int = 0) -> None:
        """Writes one complete shard.

        Args:
          shard: index of the shard.
          parts: the distributions of its positions, in order.
          lacking: number of positions with fewer than k neighbors.

        Raises:
          UserError: the distributions are empty or not finite.
          ArtifactError: the shard could not be written.
        """
        counts_N = np.concatenate([np.diff(part.offsets_Q1) for part in parts])
        ends_SxT = np.cumsum(counts_N).reshape(-1, self.length)
        starts_S = ends_SxT[:, 0] - counts_N[:: self.length]
        token_ids_M = np.concatenate([part.token_ids_M for part in parts])
        probabilities_M = np.concatenate([part.probabilities_M for part in parts]).astype(np.float16)
        labels_N = np.concatenate([part.label_probabilities_Q for part in parts])
        if not len(token_ids_M) or not (np.isfinite(probabilities_M).all() and np.isfinite(labels_N).all()):
            raise UserError(
                f"targets/{self._folder.name}: the distributions of shard {shard} are empty or not finite; set "
                "config.targets.temperature to 0 (chooses the best), or lower config.targets.minimum_probability"
            )
        arrays = {
            "offsets": np.concatenate([starts_S[:, None], ends_SxT], axis=1).astype(np.int32),
            "token_ids": token_ids_M[None].astype(self._token_dtype),
            "probabilities": probabilities_M[None],
            "label_probabilities": labels_N.reshape(-1, self.length),
        }
        statistics = {
            "entries": len(token_ids_M),
            "max_entries": int(counts_N.max()),
            "dropped_mass": float(sum(part.dropped_mass_Q.sum(dtype=np.float64) for part in parts)),
            "positions_lacking_k": lacking,
        }
        self._writer.write_shard(shard, arrays, statistics)

    def seal(self, summary: Mapping) -> Artifact:
        """Finishes the targets once all shards are complete; `summary` is added to the statistics of the shards."""
        records = self._writer.shard_records()
        statistics = [record["extra"] for record in records]
        positions = self.num_sequences * self.length
        stored = sum(array["bytes"] for record in records for array in record["arrays"].values())
        return self._writer.seal(
            {
                **summary,
                "positions": positions,
                "mean_entries": sum(shard["entries"] for shard in statistics) / positions,
                "max_entries": max(shard["max_entries"] for shard in statistics),
                "dropped_mass": sum(shard["dropped_mass"] for shard in statistics) / positions,
                "positions_lacking_k": sum(shard["positions_lacking_k"] for shard in statistics),
                "bytes_per_position": stored / positions,
            }
        )
