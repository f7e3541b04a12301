"""Which document goes where: the sample, the splits and the shards of a corpus, from one pass over its documents.

Everything here follows from the documents' text, their order and the config, so every process and every restart
comes to the same plan. Documents themselves are never held: only 16 bytes of hash and a length for each.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import ml_collections
import numpy as np

from mlpmem_jax.core.errors import UserError

SPLITS = ("train", "validation", "test")
SHARD_BYTES = 8 * 2**20
"""Text of one shard, the unit that a restarted stage redoes."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a corpus that is read from its beginning: a file, or one split of a hub data set.

    Attributes:
      name: for messages.
      read: gives its documents, the same ones in the same order at every call.
      split: the split its documents belong to, "" to have it chosen by hash.
    """

    name: str
    read: Callable[[], Iterable[str]]
    split: str = ""


@dataclasses.dataclass(frozen=True)
class Source:
    """A corpus before it is read.

    Attributes:
      inputs: what its content depends on besides the config (versions, file sizes), by name.
      parts: finds its parts; may download.
    """

    inputs: dict[str, str]
    parts: Callable[[], Sequence[Part]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where each of N documents goes.

    Attributes:
      split_N: int8, index into SPLITS, -1 for a document that is not used.
      shard_N: int32, shard that holds it.
      bytes_N: int64, size as UTF-8.
      order_N: uint64, a hash of text and seed; sorting by it shuffles the documents.
      part_ends: number of documents up to the end of each part.
    """

    split_N: np.ndarray
    shard_N: np.ndarray
    bytes_N: np.ndarray
    order_N: np.ndarray
    part_ends: np.ndarray

    @property
    def num_shards(self) -> int:
        return int(self.shard_N[-1]) + 1

    def capacity(self, split: int) -> int:
        """Most tokens that any shard can hold of a split: one a byte, and two that frame each document."""
        chosen = self.split_N == split
        return int(np.bincount(self.shard_N[chosen], self.bytes_N[chosen] + 2, minlength=1).max())

    def sample(self, split: int, max_bytes: int) -> np.ndarray:
        """Boolean [N]: a shuffled sample of a split of at most `max_bytes`, at least one document."""
        return _sample(self.split_N == split, self.order_N, self.bytes_N, max_bytes)


def _sample(candidates_N: np.ndarray, order_N: np.ndarray, bytes_N: np.ndarray, max_bytes: int) -> np.ndarray:
    chosen = np.zeros(len(candidates_N), bool)
    index = np.flatnonzero(candidates_N)
    index = index[np.argsort(order_N[index], kind="stable")]
    fitting = int((np.cumsum(bytes_N[index]) <= max_bytes).sum())
    chosen[index[: max(fitting, 1)]] = True
    return chosen


def _scan(parts: Sequence[Part], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes uint64 [N, 2], sizes in bytes int64 [N], and the number of documents up to the end of each part."""
    key = seed.to_bytes(8, "little")
    hashes, sizes, part_ends = bytearray(), array.array("q"), []
    for part in parts:
        for text in part.read():
            content = text.encode("utf-8", "surrogatepass")
            hashes += hashlib.blake2b(content, digest_size=16, key=key).digest()
            sizes.append(len(content))
        part_ends.append(len(sizes))
    return np.frombuffer(hashes, "<u8").reshape(-1, 2), np.array(sizes, np.int64), np.array(part_ends, np.int64)


def _split_by_hash(hash_N: np.ndarray, fractions: Sequence[float]) -> np.ndarray:
    """int8 [N]: the first fractions[0] of the distinct hashes get 1, the next fractions[1] get 2, the rest 0.

    Ranks rather than thresholds: a small corpus has no empty split by bad luck. Equal texts share a hash, and so a
    split.
    """
    distinct, rank_N = np.unique(hash_N, return_inverse=True)
    ends = np.cumsum([max(1, round(fraction * len(distinct))) for fraction in fractions])
    part_N = np.searchsorted(ends, rank_N, side="right") + 1
    return np.where(part_N > len(fractions), 0, part_N).astype(np.int8)


def _given_splits(parts: Sequence[Part], part_ends: np.ndarray, hash_N: np.ndarray) -> np.ndarray:
    """int8 [N]: the split that the source gives, -1 for none or for a text that a later split has too."""
    given = np.array([SPLITS.index(part.split) if part.split else 0 for part in parts], np.int8)
    split_N = np.repeat(given, np.diff(part_ends, prepend=0))
    for split in (2, 1):  # the text of a test document may be in no other split, of a validation document not in train
        repeated = np.isin(hash_N, hash_N[split_N == split]) & (split_N < split)
        split_N[repeated] = -1
    return split_N


def make_plan(parts: Sequence[Part], corpus: ml_collections.ConfigDict) -> Plan:
    """Reads all documents once and decides which are used, in which split and in which shard.

    Where the source has splits of its own they are kept, and a missing one is taken from the training documents.

    Args:
      parts: the corpus.
      corpus: the group `corpus` of the config.

    Raises:
      UserError: there is no text, or the documents are too few for three splits.
    """
    hash_Nx2, bytes_N, part_ends = _scan(parts, corpus.seed)
    if not bytes_N.size:
        names = ", ".join(part.name for part in parts[:3]) + (", ..." if len(parts) > 3 else "")
        raise UserError(f"config.corpus: there is no text in {names}; expected at least three documents")
    sample_hash_N, split_hash_N = hash_Nx2.T
    split_N = _given_splits(parts, part_ends, sample_hash_N)
    fractions = np.array([0, corpus.validation_fraction, corpus.test_fraction])
    missing = [split for split in (1, 2) if not (split_N == split).any()]
    if corpus.max_bytes:  # a split that the source gives is sampled to its share, so that it is not swallowed
        shares = fractions.copy()
        shares[missing] = 0
        shares[0] = 1 - shares.sum()
        used = [_sample(split_N == s, sample_hash_N, bytes_N, round(corpus.max_bytes * shares[s])) for s in range(3)]
        split_N[~np.any(used, axis=0)] = -1
    train = np.flatnonzero(split_N == 0)
    if missing and train.size:
        chosen = _split_by_hash(split_hash_N[train], fractions[missing])
        split_N[train] = np.array([0, *missing], np.int8)[chosen]
    if empty := [name for index, name in enumerate(SPLITS) if not (split_N == index).any()]:
        raise UserError(
            f"config.corpus: {len(np.unique(sample_hash_N[split_N >= 0]))} different documents give no {empty[0]} "
            "split; expected at least one document in each of train, validation and test: give more text, a smaller "
            "config.corpus.document_bytes or a larger config.corpus.max_bytes"
        )
    used_bytes_N = np.where(split_N >= 0, bytes_N, 0)
    shard_N = ((np.cumsum(used_bytes_N) - used_bytes_N) // SHARD_BYTES).astype(np.int32)
    _, shard_N = np.unique(shard_N, return_inverse=True)  # a document larger than a shard leaves numbers out
    return Plan(split_N, shard_N.astype(np.int32), bytes_N, sample_hash_N, part_ends)


def read_selected(parts: Sequence[Part], plan: Plan, selected_N: np.ndarray) -> Iterator[tuple[int, str]]:
    """Documents where `selected_N` is true, with their index, in order; parts that hold none are not opened."""
    start = 0
    for part, end in zip(parts, plan.part_ends, strict=True):
        wanted = np.flatnonzero(selected_N[start:end])
        if wanted.size:
            last = start + int(wanted[-1])
            for index, text in enumerate(part.read(), start):
                if selected_N[index]:
                    yield index, text
                if index == last:
                    break
        start = int(end)
