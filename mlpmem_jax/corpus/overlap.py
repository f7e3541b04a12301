"""How much text of one split also occurs verbatim in another: a measure of leakage between splits.

The overlap for n is the share of a held-out split's words that are inside a run of n words that also occurs in the
training split. Words are lowercase and separated by white space. Runs do not cross documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

LENGTHS = (13, 25)
"""Words per run: 13 as in GPT-3's contamination test (arXiv:2005.14165, appendix C); 25 is hardly ever chance."""

MUCH = 0.1
"""Share of words in 13-word runs of training text above which users are told; unrelated articles have 0.01 to 0.05."""

END = 0
"""Separates documents, and replaces words that no held-out text has: no run crosses it."""

_BATCH_WORDS = 2**18
_FILTER_BITS = 24
_NONE = np.empty(0, np.int64)


def word_runs(words_N: np.ndarray, length: int) -> np.ndarray:
    """A hash of every run of `length` words, uint64 [N - length + 1].

    Args:
      words_N: the number of each word, int64; equal words have equal numbers.
    """
    starts = max(len(words_N) - length + 1, 0)
    # Multiplication spreads the numbers of words, which are small, over all 64 bits (splitmix64).
    mixed_N = words_N.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed_N ^= mixed_N >> np.uint64(29)
    mixed_N *= np.uint64(0xBF58476D1CE4E5B9)
    mixed_N ^= mixed_N >> np.uint64(32)
    runs_X = np.zeros(starts, np.uint64)
    for offset in range(length):
        runs_X *= np.uint64(0x94D049BB133111EB)
        runs_X += mixed_N[offset : offset + starts]
    return runs_X ^ (runs_X >> np.uint64(31))


def inside_runs(begins_X: np.ndarray, length: int, words: int) -> np.ndarray:
    """Boolean [words]: which words are inside a run of `length` words that begins where `begins_X` is true."""
    change = np.zeros(words + 1, np.int64)
    begins = np.flatnonzero(begins_X)
    change[begins] += 1
    change[begins + length] -= 1
    return np.cumsum(change[:-1]) > 0


class WordNumbers:
    """Numbers words in order of first occurrence, from 1."""

    def __init__(self):
        self._numbers: dict[str, int] = {}

    def add(self, text: str) -> list[int]:
        """Numbers of the words of a text; new words get new numbers."""
        numbers = self._numbers
        return [numbers.setdefault(word, len(numbers) + 1) for word in text.lower().split()]

    def known(self, text: str) -> list[int]:
        """Numbers of the words of a text, with `END` for words that were never added."""
        get = self._numbers.get
        return [get(word, END) for word in text.lower().split()]


def whole_runs(words_N: np.ndarray, length: int) -> np.ndarray:
    """Boolean [N - length + 1]: runs without an `END` among their words."""
    ends = np.cumsum(words_N == END)
    starts = max(len(words_N) - length + 1, 0)
    return ends[length - 1 :][:starts] == np.append(0, ends)[:starts]


class _Runs:
    """The runs of one length in all held-out texts, and which of them were seen in training text."""

    def __init__(self, length: int, words: Sequence[np.ndarray]):
        self._length = length
        hashes = [word_runs(words_N, length) for words_N in words]
        self._distinct = np.unique(np.concatenate(hashes))
        self._seen = np.zeros(len(self._distinct), bool)
        self._filter = np.zeros(2**_FILTER_BITS, bool)  # rules out nearly all training text, with one lookup per run
        self._filter[self._bits(self._distinct)] = True

    @staticmethod
    def _bits(hashes: np.ndarray) -> np.ndarray:
        return hashes >> np.uint64(64 - _FILTER_BITS)

    def see(self, words_N: np.ndarray) -> None:
        hashes = word_runs(words_N, self._length)[whole_runs(words_N, self._length)]
        hashes = hashes[self._filter[self._bits(hashes)]]
        place = np.minimum(np.searchsorted(self._distinct, hashes), len(self._distinct) - 1)
        self._seen[place[self._distinct[place] == hashes]] = True

    def share(self, words_N: np.ndarray) -> float:
        """The share of words inside runs that were seen."""
        hashes = word_runs(words_N, self._length)
        begins_X = self._seen[np.searchsorted(self._distinct, hashes)] & whole_runs(words_N, self._length)
        inside_N = inside_runs(begins_X, self._length, len(words_N))
        return float(inside_N.sum() / max((words_N > 0).sum(), 1))


def measure(train: Iterable[str], held_out: dict[str, Iterable[str]]) -> dict[str, dict[str, float]]:
    """The shares of words inside runs that also occur in the training text.

    Memory is a small multiple of the held-out text's size; the training text is streamed.

    Args:
      train: documents of the training split.
      held_out: documents of other splits, by name.

    Returns:
      Shares by split, then by length of the run as a string: {"test": {"13": 0.02, "25": 0.001}}.
    """
    numbers = WordNumbers()
    words = {split: next(_batches(map(numbers.add, texts), None), _NONE) for split, texts in held_out.items()}
    runs = {length: _Runs(length, list(words.values())) for length in LENGTHS}
    for words_N in _batches(map(numbers.known, train), _BATCH_WORDS):
        for counter in runs.values():
            counter.see(words_N)
    return {split: {str(length): runs[length].share(words_N) for length in LENGTHS} for split, words_N in words.items()}


def _batches(documents: Iterable[list[int]], size: int | None) -> Iterator[np.ndarray]:
    """Documents, each followed by an `END`, joined to int64 arrays of at least `size` words; None = one array."""
    batch = []
    for words in documents:
        batch += words
        batch.append(END)
        if size is not None and len(batch) >= size:
            yield np.array(batch, np.int64)
            batch = []
    if batch:
        yield np.array(batch, np.int64)
