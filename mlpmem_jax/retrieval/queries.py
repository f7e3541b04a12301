"""Queries: positions whose neighbors are searched, read from the datastore of their split."""

from __future__ import annotations

import concurrent.futures
import dataclasses

import numpy as np

from mlpmem_jax.core.artifacts import Artifact

_CONCURRENT_READS = 16  # small range reads, which are limited by storage latency


@dataclasses.dataclass(frozen=True)
class Queries:
    """Positions of a split whose neighbors are searched.

    Attributes:
      keys_QxD: float32 [Q, D].
      next_tokens_Q: int32 [Q].
      positions_Q: int64 [Q], position within the split.
      documents_Q: int32 [Q], document within the split.
      base_log_probabilities_Q: float32 [Q], log p_LM(next token); None if the datastore has none.
    """

    keys_QxD: np.ndarray
    next_tokens_Q: np.ndarray
    positions_Q: np.ndarray
    documents_Q: np.ndarray
    base_log_probabilities_Q: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.positions_Q)

    def __getitem__(self, part: slice) -> Queries:
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Queries(*(None if field is None else field[part] for field in fields))


def read_queries(datastore: Artifact, first: int, stop: int) -> Queries:
    """All positions of the sequences `first` to `stop`."""
    length = datastore.arrays["next_tokens"].shape[1]
    keys_SxTxD = datastore.read("keys", first, stop)
    scored = "base_log_probabilities" in datastore.arrays
    return Queries(
        keys_QxD=keys_SxTxD.reshape(-1, keys_SxTxD.shape[-1]).astype(np.float32),
        next_tokens_Q=datastore.read("next_tokens", first, stop).ravel(),
        positions_Q=np.arange(first * length, stop * length),
        documents_Q=datastore.read("documents", first, stop).ravel(),
        base_log_probabilities_Q=datastore.read("base_log_probabilities", first, stop).ravel() if scored else None,
    )


def sample_queries(datastore: Artifact, count: int) -> Queries:
    """`count` positions sampled from the whole split without replacement; all of them if there are no more."""
    sequences, length = datastore.arrays["next_tokens"].shape
    drawn_Q = np.random.default_rng(0).choice(sequences * length, min(count, sequences * length), replace=False)
    drawn_Q.sort()

    def drawn_from(sequence: int) -> Queries:
        return read_queries(datastore, sequence, sequence + 1)[drawn_Q[drawn_Q // length == sequence] % length]

    with concurrent.futures.ThreadPoolExecutor(_CONCURRENT_READS) as threads:
        parts = list(threads.map(drawn_from, np.unique(drawn_Q // length).tolist()))
    columns = ([getattr(part, field.name) for part in parts] for field in dataclasses.fields(Queries))
    return Queries(*(None if column[0] is None else np.concatenate(column) for column in columns))


def sample_keys(datastore: Artifact, count: int) -> np.ndarray:
    """About `count` keys from evenly spaced sequences, [N, D]."""
    sequences, length = datastore.arrays["next_tokens"].shape
    chosen = np.linspace(0, sequences - 1, min(sequences, -(-count // length))).astype(int).tolist()
    with concurrent.futures.ThreadPoolExecutor(_CONCURRENT_READS) as threads:
        return np.concatenate(list(threads.map(lambda row: datastore.read("keys", row, row + 1)[0], chosen)))
