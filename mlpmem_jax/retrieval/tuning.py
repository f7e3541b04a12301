"""Tunes the effort of an approximate search: the cheapest one that reaches the required recall.

Costs are bytes read per query, not seconds, so that a build gives the same bytes on any machine.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from mlpmem_jax.core.errors import UserError
from mlpmem_jax.core.progress import say
from mlpmem_jax.retrieval.backends import Effort
from mlpmem_jax.retrieval.key_shards import KeyShards
from mlpmem_jax.retrieval.quality import Sample


@dataclasses.dataclass(frozen=True)
class Trial:
    """The result of searching all key shards with one effort.

    Attributes:
      effort: the effort; None if the backend has only one.
      bytes_read: bytes read per query and key shard; 0 if the backend has only one effort.
      recall: recall on the sample.
      packed_QxK: the sample's neighbors with their next tokens, packed by `neighbors.pack`.
    """

    effort: Effort | None
    bytes_read: int
    recall: float
    packed_QxK: np.ndarray

    def summary(self, temperature: float, sample: Sample) -> dict[str, float]:
        """One point of the curve that manifests store."""
        point = {"recall": self.recall, "total_variation": sample.total_variation(self.packed_QxK, temperature)}
        return point if self.effort is None else {**self.effort.summary(), "bytes_read": self.bytes_read, **point}

    def __str__(self) -> str:
        return f"{self.recall:.4f}" + (f" with {self.effort}" if self.effort else "")


def reach(key_shards: KeyShards, sample: Sample, recall: float) -> tuple[list[Trial], int]:
    """Tries increasing efforts until one reaches the recall, or decreasing ones if the first exceeds it by far.

    Args:
      key_shards: the key shards, each with an index.
      sample: queries with their true neighbors.
      recall: the required recall, from 0 to 1.

    Returns:
      (all trials, cheapest first; the index of the chosen one).

    Raises:
      UserError: no effort reaches the recall.
    """
    efforts, place = key_shards.efforts()
    efforts = efforts or [None]
    trials: dict[int, Trial] = {}

    def recall_of(place: int) -> float:
        if place not in trials:
            trials[place] = _trial(key_shards, sample, efforts[place])
            if trials[place].recall < recall:
                say(f"targets: recall {trials[place]}, below config.targets.recall={recall:g}")
        return trials[place].recall

    if len(key_shards) > 1 and len(efforts) > 1:
        # Indices are large, so a single shard rules out efforts that need not be tried on all of them.
        in_first_shard = functools.cache(lambda place: sample.search(efforts[place], range(1))[0])
        place = _cheapest(in_first_shard, len(efforts), place, recall)
    place = _cheapest(recall_of, len(efforts), place, recall)
    tried = [trials[number] for number in sorted(trials)]
    if trials[place].recall >= recall:
        return tried, sorted(trials).index(place)
    best = max(tried, key=lambda trial: trial.recall)
    raise UserError(
        f"config.targets.recall: expected {recall:g}, but the best of {len(tried)} searches reached "
        f"{best}. What may help: {key_shards.search.backend.remedies}. To accept worse neighbors, set "
        f"config.targets.recall to {np.floor(100 * best.recall) / 100:g}"
    )


def _trial(key_shards: KeyShards, sample: Sample, effort: Effort | None) -> Trial:
    keys = key_shards.rows(0), key_shards.searched_width, key_shards.search.backend.k
    return Trial(effort, effort.cost(*keys) if effort else 0, *sample.search(effort))


def _cheapest(recall_of: Callable[[int], float], count: int, first: int, recall: float) -> int:
    """The index of the cheapest effort that reaches the recall; of the greatest one if none from the first on does.

    Goes up from the first one, or down if the first one misses less than half of what may be missed.
    """
    if recall_of(first) < recall:
        return next((place for place in range(first + 1, count) if recall_of(place) >= recall), count - 1)
    place = first
    if recall_of(first) >= (1 + recall) / 2:
        while place > 0 and recall_of(place - 1) >= recall:
            place -= 1
    return place
