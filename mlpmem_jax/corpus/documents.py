"""Partitions a corpus into sample, splits and shards, in one pass over its documents.

The partition depends only on the documents' text, their order and the config, so every process and every restart
computes the same one. Documents are not kept in memory: only 16 bytes of hash and a length for each.

Splits consist of whole groups: the parts of a file, an article, the rows of one book. If text continued across a split
boundary, a model or a search could recognize the text it is evaluated on.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import ml_collections
import numpy as np

from mlpmem_jax.core.errors import UserError

SPLITS = ("train", "validation", "test")
SHARD_BYTES = 8 * 2**20
"""Text per shard, in bytes; a restarted stage redoes at most whole shards."""


class Document(NamedTuple):
    """One text of a corpus.

    Attributes:
      text: the text; blank for a row without text, which is counted and dropped.
      group: name of its group, which is never divided between splits; "" = its own group.
    """

    text: str
    group: str = ""


@dataclasses.dataclass(frozen=True)
class Part:
    """A sequentially read part of a corpus: a file, or one split of a hub data set.

    Attributes:
      name: name for messages.
      read: yields its documents, the same ones in the same order at every call.
      split: the split its documents belong to; "" = chosen by hash.
      data_set: parts of one data set are split together, so that each set of a mixture is in every split.
      revision: the version of the data set, such as a commit; "" = unknown.
    """

    name: str
    read: Callable[[], Iterable[Document]]
    split: str = ""
    data_set: str = ""
    revision: str = ""


@dataclasses.dataclass(frozen=True)
class Source:
    """A corpus before it is read.

    Attributes:
      inputs: what its content depends on in addition to the config (versions, checksums of files), by name.
      parts: finds its parts; may download.
      notes: notes for the user on how it was found, one sentence each.
    """

    inputs: dict[str, str]
    parts: Callable[[], Sequence[Part]]
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Partition:
    """The split, group and shard of each of N documents.

    Attributes:
      split_N: int8, index into SPLITS; -1 for a document that is not used.
      group_N: int32, number of its group within its split, never decreasing; a group whose documents are not
        contiguous has several numbers.
      shard_N: int32, its shard.
      bytes_N: int64, size as UTF-8.
      order_N: uint64, a hash of text and seed; sorting by it shuffles the documents.
      part_ends: number of documents up to the end of each part.
      notes: notes for the user on the result, one sentence each.
    """

    split_N: np.ndarray
    group_N: np.ndarray
    shard_N: np.ndarray
    bytes_N: np.ndarray
    order_N: np.ndarray
    part_ends: np.ndarray
    notes: tuple[str, ...]

    @property
    def num_shards(self) -> int:
        return int(self.shard_N[-1]) + 1

    def capacity(self, split: int, tokens_per_byte: int = 1, framing: int = 2) -> int:
        """Upper bound on the tokens of a split in any shard, with `framing` tokens around each document: its end, and
        the space that some tokenizers put before a text."""
        chosen = self.split_N == split
        tokens_N = tokens_per_byte * self.bytes_N[chosen] + framing
        return int(np.bincount(self.shard_N[chosen], tokens_N, minlength=1).max())

    def sample(self, split: int, max_bytes: int) -> np.ndarray:
        """Boolean [N]: a shuffled sample of a split of at most `max_bytes`, at least one document."""
        return _sample(self.split_N == split, self.order_N, self.bytes_N, max_bytes)


class _Scan(NamedTuple):
    """The result of one pass over N documents, read in several parts; sizes are 0 for documents without text."""

    text_hash_N: np.ndarray
    group_hash_N: np.ndarray
    bytes_N: np.ndarray
    part_ends: np.ndarray
    repaired: int


def _sample(candidates_N: np.ndarray, order_N: np.ndarray, bytes_N: np.ndarray, max_bytes: int) -> np.ndarray:
    chosen = np.zeros(len(candidates_N), bool)
    index = np.flatnonzero(candidates_N)
    index = index[np.argsort(order_N[index], kind="stable")]
    fitting = int((np.cumsum(bytes_N[index]) <= max_bytes).sum())
    chosen[index[: max(fitting, 1)]] = True
    return chosen


def _without_surrogates(text: str) -> str:
    """The text with U+FFFD for each unpaired surrogate, which JSON can express and UTF-8 cannot."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _scan(parts: Sequence[Part], seed: int) -> _Scan:
    key = seed.to_bytes(8, "little")
    hashes, sizes, part_ends, repaired = bytearray(), array.array("q"), [], 0
    for part in parts:
        for text, group in part.read():
            try:
                content = text.encode()
            except UnicodeEncodeError:
                content = _without_surrogates(text).encode()
                repaired += 1
            digest = hashlib.blake2b(content, digest_size=16, key=key).digest()
            if group:
                name = group.encode("utf-8", "surrogatepass")
                digest = digest[:8] + hashlib.blake2b(name, digest_size=8, key=key, person=b"group").digest()
            hashes += digest
            sizes.append(len(content) if text.strip() else 0)
        part_ends.append(len(sizes))
    text_hash_N, group_hash_N = np.frombuffer(hashes, "<u8").reshape(-1, 2).T.copy()
    return _Scan(text_hash_N, group_hash_N, np.array(sizes, np.int64), np.array(part_ends, np.int64), repaired)


def _given_splits(parts: Sequence[Part], scan: _Scan) -> np.ndarray:
    """int8 [N]: the split given by the source, or "train" if none is given; -1 for empty or duplicate texts.

    Of equal texts, the first in the test split is kept, or else in validation, or else in training.
    """
    given = np.array([SPLITS.index(part.split) if part.split else 0 for part in parts], np.int8)
    given_N = np.repeat(given, np.diff(scan.part_ends, prepend=0))
    by_split = np.argsort(-given_N, kind="stable")
    _, first = np.unique(scan.text_hash_N[by_split], return_index=True)
    split_N = np.full_like(given_N, -1)
    split_N[by_split[first]] = given_N[by_split[first]]
    return np.where(scan.bytes_N > 0, split_N, -1).astype(np.int8)


def _split_groups(group_hash_N: np.ndarray, bytes_N: np.ndarray, fractions: Sequence[float]) -> np.ndarray | None:
    """int8 [N]: groups in the order of their hashes fill `fractions[0]` of the bytes as 1, and so on; the rest is 0.

    If there are enough of them, only groups of up to an eighth of a split are used, so that a split does not consist
    of one long text. A group larger than its split is used only if all groups are. None if there are too few groups.
    """
    distinct, group_N = np.unique(group_hash_N, return_inverse=True)
    bytes_U = np.bincount(group_N, bytes_N)
    split_U = np.zeros(len(distinct), np.int8)
    if len(distinct) <= len(fractions):
        return None
    for split, fraction in enumerate(fractions, 1):
        quota, free = fraction * bytes_U.sum(), split_U == 0
        for least in (8, 4, 2, 1):
            fitting = np.flatnonzero(free & (bytes_U <= quota / least))
            if bytes_U[fitting].sum() >= quota:
                break
        if fitting.size:
            ends = np.cumsum(bytes_U[fitting])
            chosen = fitting[ends - bytes_U[fitting] / 2 <= quota]  # up to the sum closest to the quota
            chosen = chosen[: free.sum() - 1 - (len(fractions) - split)]
        else:
            chosen = np.flatnonzero(free)[[bytes_U[free].argmin()]]
        split_U[chosen] = split
    return split_U[group_N]


def _split_in_place(bytes_N: np.ndarray, fractions: Sequence[float]) -> np.ndarray:
    """int8 [N]: the first documents are 0, followed by `fractions[0]` of the bytes as 1, and so on."""
    middle_N = np.cumsum(bytes_N) - bytes_N / 2
    shares = np.cumsum([1 - sum(fractions), *fractions[:-1]])
    ends = np.searchsorted(middle_N, shares * bytes_N.sum())
    for index in range(len(ends)):  # at least one document per split
        low, high = (ends[index - 1] if index else 0) + 1, len(bytes_N) - len(ends) + index
        ends[index] = min(max(ends[index], low), high)
    if ends[0] < 1:
        return np.zeros(len(bytes_N), np.int8)
    return np.searchsorted(ends, np.arange(len(bytes_N)), side="right").astype(np.int8)


def _add_missing_splits(split_N: np.ndarray, parts: Sequence[Part], scan: _Scan, fractions: Sequence[float]) -> list:
    """Takes the splits that a data set lacks from its training documents, in place; returns notes.

    If there are too few groups, the documents are split in order and each becomes its own group.
    """
    notes = []
    sets = np.array([part.data_set for part in parts])
    lengths = np.diff(scan.part_ends, prepend=0)
    for data_set in dict.fromkeys(sets):
        inside_N = np.repeat(sets == data_set, lengths)
        missing = [split for split in (1, 2) if not (split_N[inside_N] == split).any()]
        train = np.flatnonzero(inside_N & (split_N == 0))
        if not missing or not train.size:
            continue
        wanted = [fractions[split] for split in missing]
        chosen = _split_groups(scan.group_hash_N[train], scan.bytes_N[train], wanted)
        if chosen is None:
            chosen = _split_in_place(scan.bytes_N[train], wanted)
            scan.group_hash_N[train] = scan.text_hash_N[train]  # a single text is divided into its pieces
            if chosen.any():
                order = ", then ".join(SPLITS[split] for split in (0, *missing))
                notes.append(
                    f"{data_set or parts[0].name}: too few texts to split without dividing them, so all text is "
                    f"split in order, at paragraphs: first {order}"
                )
        split_N[train] = np.array([0, *missing], np.int8)[chosen]
    return notes


def _number_groups(split_N: np.ndarray, group_hash_N: np.ndarray) -> tuple[np.ndarray, int]:
    """int32 [N]: number of each document's group within its split; and how many groups are not contiguous."""
    number_N, scattered = np.zeros(len(split_N), np.int32), 0
    for split in range(len(SPLITS)):
        index = np.flatnonzero(split_N == split)
        hashes = group_hash_N[index]
        begins = hashes[1:] != hashes[:-1]
        number_N[index[1:]] = np.cumsum(begins)
        if index.size:
            _, pieces = np.unique(hashes[np.append(True, begins)], return_counts=True)
            scattered += int((pieces > 1).sum())
    return number_N, scattered


def make_partition(parts: Sequence[Part], corpus: ml_collections.ConfigDict) -> Partition:
    """Reads all documents once and decides which are used, and in which split and shard.

    A data set's own splits are kept, and a missing one is taken from its training documents, group by group. Exact
    duplicates are used once.

    Args:
      parts: the corpus.
      corpus: the group `corpus` of the config.

    Raises:
      UserError: there is no text, or the documents are too few for three splits.
    """
    scan = _scan(parts, corpus.seed)
    bytes_N = scan.bytes_N
    if not bytes_N.any():
        names = ", ".join(part.name for part in parts[:3]) + (", ..." if len(parts) > 3 else "")
        raise UserError(f"config.corpus: no text in {names}; expected at least three documents")
    split_N = _given_splits(parts, scan)
    repeated_N = (split_N < 0) & (bytes_N > 0)
    notes = [
        f"{what}: {count:,}"
        for what, count in (
            ("dropped rows without text", (bytes_N == 0).sum()),
            ("dropped exact duplicates of other documents", repeated_N.sum()),
            ("documents in which U+FFFD replaced unpaired surrogates", scan.repaired),
        )
        if count
    ]
    fractions = [0, corpus.validation_fraction, corpus.test_fraction]
    notes += _add_missing_splits(split_N, parts, scan, fractions)
    if corpus.max_bytes:
        shares = [1 - sum(fractions), *fractions[1:]]
        used = [
            _sample(split_N == split, scan.text_hash_N, bytes_N, round(corpus.max_bytes * share))
            for split, share in enumerate(shares)
        ]
        split_N[~np.any(used, axis=0)] = -1
    if empty := [name for index, name in enumerate(SPLITS) if not (split_N == index).any()]:
        raise UserError(
            f"config.corpus: {len(np.unique(scan.text_hash_N[split_N >= 0]))} different documents leave the "
            f"{empty[0]} split empty; expected at least one document in each of train, validation and test: provide "
            "more text, lower config.corpus.document_bytes or raise config.corpus.max_bytes"
        )
    group_N, scattered = _number_groups(split_N, scan.group_hash_N)
    if scattered:
        notes.append(
            f"the documents of {scattered:,} groups are not contiguous: sort the corpus by group if "
            "config.targets.exclude='document' should exclude whole groups"
        )
    used_bytes_N = np.where(split_N >= 0, bytes_N, 0)
    shard_N = ((np.cumsum(used_bytes_N) - used_bytes_N) // SHARD_BYTES).astype(np.int32)
    # Documents after the last used one would produce empty shards.
    shard_N = np.minimum(shard_N, shard_N[split_N >= 0].max())
    _, shard_N = np.unique(shard_N, return_inverse=True)  # a document larger than a shard leaves gaps in the numbers
    return Partition(
        split_N, group_N, shard_N.astype(np.int32), bytes_N, scan.text_hash_N, scan.part_ends, tuple(notes)
    )


def read_selected(parts: Sequence[Part], partition: Partition, selected_N: np.ndarray) -> Iterator[tuple[int, str]]:
    """Texts where `selected_N` is true, with their index, in order; parts without any are not opened."""
    start = 0
    for part, end in zip(parts, partition.part_ends, strict=True):
        wanted = np.flatnonzero(selected_N[start:end])
        if wanted.size:
            last = start + int(wanted[-1])
            for index, (text, _) in enumerate(part.read(), start):
                if selected_N[index]:
                    yield index, _without_surrogates(text)
                if index == last:
                    break
        start = int(end)
