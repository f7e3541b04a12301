"""Packs the texts to score into sequences of one length, so that what they have in common is computed once.

The answers to a question share its prompt, and all prompts of a task may share a beginning. Texts are split into
the prefix of them all, the stem of a question, and branches (`models.packed`), and laid out one after another.

Dimensions: B sequences of T positions, P scored positions of a text or a sequence, J tokens scored at a position, M in
a sequence.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from mlpmem_jax.models.packed import Layout

_LENGTHS = (32, 64, 128, 256, 512, 768, 1024, 1536, 2048)
_SHORT = 512  # length of the sequences that shorter documents are packed into
POSITIONS_AT_ONCE = 2048  # positions per forward pass and batch shard
_READ_AT_ONCE = 512  # positions per forward pass and batch shard at which logits are computed
_SHORTEST_PREFIX = 16  # tokens


@dataclasses.dataclass(frozen=True)
class Row:
    """One text, and what to score in it.

    Attributes:
      tokens_T: token ids.
      positions_P: positions whose next token is scored.
      ids_PxJ: tokens whose log-probabilities are wanted at each.
    """

    tokens_T: Sequence[int]
    positions_P: Sequence[int]
    ids_PxJ: Sequence[Sequence[int]]

    @classmethod
    def of_continuation(cls, prompt: Sequence[int], whole: Sequence[int]) -> Row:
        """Scores every token of a text after its prompt; the text's tokens need not begin with the prompt's."""
        first = min(len(prompt), len(whole) - 1)
        return cls(whole[:-1], range(first - 1, len(whole) - 1), [[token] for token in whole[first:]])

    @classmethod
    def of_next(cls, prompt: Sequence[int], ids: Sequence[int]) -> Row:
        """Scores several candidates for the one token after a prompt."""
        return cls(prompt, [len(prompt) - 1], [list(ids)])

    def truncated(self, length: int) -> Row:
        """The last `length` tokens, with positions shifted to match."""
        excess = max(0, len(self.tokens_T) - length)
        kept = [index for index, position in enumerate(self.positions_P) if position >= excess]
        return Row(
            self.tokens_T[excess:],
            [self.positions_P[index] - excess for index in kept],
            [self.ids_PxJ[index] for index in kept],
        )

    @property
    def shape(self) -> tuple[int, int]:
        """[P, J]."""
        return len(self.ids_PxJ), len(self.ids_PxJ[0]) if self.ids_PxJ else 0


@dataclasses.dataclass(frozen=True)
class Batch:
    """The sequences of one forward pass, int32.

    Attributes:
      layout: arrays of [B, T].
      reads_BxP: positions whose next token is scored.
      places_BxM: for each scored token, the index of its position in `reads_BxP`.
      ids_BxM: the scored tokens.
      parts: for each row (its number, its sequence, the offset of its first token within M).
    """

    layout: Layout
    reads_BxP: np.ndarray
    places_BxM: np.ndarray
    ids_BxM: np.ndarray
    parts: list[tuple[int, int, int]]


def shared_prefix(rows: Sequence[Row]) -> list[int]:
    """The longest prefix that at least half of the rows share and in which nothing is scored; [] if too short."""
    prefix: list[int] = []
    active = [(row.tokens_T, min(row.positions_P, default=0)) for row in rows]
    while True:
        place = len(prefix)
        counts = Counter(tokens[place] for tokens, first in active if place < first)
        token, count = max(counts.items(), key=lambda item: item[1], default=(0, 0))
        if count < 2 or 2 * count < len(rows):
            break
        active = [(tokens, first) for tokens, first in active if place < first and tokens[place] == token]
        prefix.append(token)
    return prefix if len(prefix) >= _SHORTEST_PREFIX else []


def begins_with(row: Row, prefix: Sequence[int]) -> bool:
    """Whether a row starts with the prefix, and is scored only after it."""
    return min(row.positions_P, default=0) >= len(prefix) and list(row.tokens_T[: len(prefix)]) == list(prefix)


@dataclasses.dataclass
class _Document:
    """Rows with a common stem, after a prefix of `first` tokens."""

    rows: list[int]
    stem: int
    length: int


def _documents(rows: Sequence[Row], numbers: Sequence[int], first: int) -> list[_Document]:
    """Groups adjacent rows into a document as long as that saves positions and their stem is half of a row."""
    documents: list[_Document] = []
    for number in numbers:
        tokens = rows[number].tokens_T
        own = len(tokens) - first
        if documents:
            last = documents[-1]
            common = _common(rows[last.rows[0]].tokens_T, tokens, first, first + last.stem)
            lengths = [len(rows[row].tokens_T) - first for row in last.rows]
            joined = common + sum(lengths) + own - common * (len(lengths) + 1)
            if 2 * common >= own and joined < last.length + own and joined <= POSITIONS_AT_ONCE:
                documents[-1] = _Document([*last.rows, number], common, joined)
                continue
        documents.append(_Document([number], own, own))
    return documents


def _common(tokens: Sequence[int], others: Sequence[int], first: int, stop: int) -> int:
    """The number of equal tokens, counted from `first` up to `stop`."""
    stop = min(stop, len(tokens), len(others))
    differs = np.flatnonzero(np.asarray(tokens[first:stop]) != np.asarray(others[first:stop]))
    return int(differs[0]) if len(differs) else stop - first


def batches(rows: Sequence[Row], numbers: Sequence[int], first: int, shards: int) -> Iterator[Batch]:
    """Packs rows into batches; all batches of one sequence length have the same shape.

    Args:
      rows: all of them.
      numbers: indices of the rows to pack.
      first: length of the prefix of each row, which is computed elsewhere.
      shards: B is a multiple of it.
    """
    documents = sorted(_documents(rows, numbers, first), key=lambda document: -document.length)
    short = [document.length for document in documents if document.length <= _SHORT]
    short_length = _rounded(max(short[0], min(sum(short), _SHORT))) if short else 0

    def sequence_length(document: _Document) -> int:
        return max(short_length, _rounded(document.length))

    for length, of_length in itertools.groupby(documents, sequence_length):
        sequences = [_Sequence(rows, first, packed) for packed in _packed(list(of_length), length)]
        reads = _power_of_two(max(len(sequence.reads) for sequence in sequences))
        tokens = _power_of_two(max(len(sequence.ids) for sequence in sequences))
        size = shards * max(1, min(POSITIONS_AT_ONCE // length, _READ_AT_ONCE // reads, -(-len(sequences) // shards)))
        for start in range(0, len(sequences), size):
            yield _batch(sequences[start : start + size], size, length, reads, tokens)


def _packed(documents: list[_Document], length: int) -> Iterator[list[_Document]]:
    """Groups of documents, each filling one sequence."""
    packed, filled = [], 0
    for document in documents:
        if filled + document.length > length:
            yield packed
            packed, filled = [], 0
        packed.append(document)
        filled += document.length
    if packed:
        yield packed


class _Sequence:
    """Documents laid out one after another."""

    def __init__(self, rows: Sequence[Row], first: int, documents: Sequence[_Document]):
        self.tokens, self.positions, self.documents, self.branches = [], [], [], []
        self.parts: list[tuple[int, int]] = []
        places, ids, count, branch = [], [], 0, 0
        for number, document in enumerate(documents, start=1):
            start = len(self.tokens)
            stem = rows[document.rows[0]].tokens_T[first : first + document.stem]
            self._extend(stem, first, number, 0)
            for row_number in document.rows:
                row, branch = rows[row_number], branch + 1
                # Maps positions in the row to positions in the sequence: those of the stem are shared.
                shift = len(self.tokens) - first - document.stem
                self._extend(row.tokens_T[first + document.stem :], first + document.stem, number, branch)
                read_P = np.asarray(row.positions_P, int)
                read_P = np.where(read_P < first + document.stem, read_P - first + start, read_P + shift)
                self.parts.append((row_number, count))
                ids_PxJ = np.asarray(row.ids_PxJ, np.int32).reshape(row.shape)
                places.append(np.repeat(read_P, ids_PxJ.shape[1]))
                ids.append(ids_PxJ.ravel())
                count += ids_PxJ.size
        self.reads, self.places = np.unique(np.concatenate(places), return_inverse=True)
        self.ids = np.concatenate(ids)

    def _extend(self, tokens: Sequence[int], position: int, document: int, branch: int) -> None:
        self.tokens += tokens
        self.positions += range(position, position + len(tokens))
        self.documents += [document] * len(tokens)
        self.branches += [branch] * len(tokens)


def _batch(sequences: Sequence[_Sequence], size: int, length: int, reads: int, tokens: int) -> Batch:
    def filled(values: list, width: int) -> np.ndarray:
        array = np.zeros((size, width), np.int32)
        for row, of_sequence in zip(array, values, strict=False):
            row[: len(of_sequence)] = of_sequence
        return array

    return Batch(
        Layout(*(filled([getattr(sequence, name) for sequence in sequences], length) for name in Layout._fields)),
        filled([sequence.reads for sequence in sequences], reads),
        filled([sequence.places for sequence in sequences], tokens),
        filled([sequence.ids for sequence in sequences], tokens),
        [(row, place, start) for place, sequence in enumerate(sequences) for row, start in sequence.parts],
    )


def _rounded(length: int) -> int:
    return next((rounded for rounded in _LENGTHS if rounded >= length), -(-length // 1024) * 1024)


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
