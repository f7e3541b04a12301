"""How hard an approximate search has to look: the cheapest way that reaches the recall that was asked for.

Costs are bytes read for a query, not seconds: a build ends with the same bytes on any machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from mlpmem_jax.core.errors import UserError
from mlpmem_jax.core.progress import say
from mlpmem_jax.retrieval.backends import Effort
from mlpmem_jax.retrieval.key_shards import KeyShards
from mlpmem_jax.retrieval.quality import Sample


@dataclasses.dataclass(frozen=True)
class Trial:
    """One way to search all key shards.

    Attributes:
      effort: None where the backend knows only one.
      bytes_read: by a query, in a shard of keys; 0 where the backend knows only one effort.
      recall: on the sample.
      packed_QxK: the sample's neighbors with their next tokens, as `neighbors.pack` does.
    """

    effort: Effort | None
    bytes_read: int
    recall: float
    packed_QxK: np.ndarray

    def summary(self, temperature: float, sample: Sample) -> dict[str, float]:
        """One point of the curve that a manifest keeps."""
        point = {"recall": self.recall, "total_variation": sample.total_variation(self.packed_QxK, temperature)}
        return point if self.effort is None else {**self.effort.summary(), "bytes_read": self.bytes_read, **point}

    def __str__(self) -> str:
        return f"{self.recall:.3f}" + (f" with {self.effort}" if self.effort else "")


def reach(key_shards: KeyShards, sample: Sample, recall: float) -> list[Trial]:
    """Tries searches, the cheapest first, up to one that reaches a recall.

    Args:
      key_shards: with an index each.
      sample: queries with their true neighbors.
      recall: wanted, from 0 to 1.

    Returns:
      What was tried; the last one reached the recall.

    Raises:
      UserError: none does.
    """
    efforts, first = key_shards.efforts()
    if len(key_shards) > 1:
        # Indices are large: one shard alone tells which efforts need not be tried on all of them.
        first = _enough_for_one(sample, recall, efforts, first)
    trials = []
    for effort in efforts[first:] or [None]:
        trials.append(_trial(key_shards, sample, effort))
        if trials[-1].recall >= recall:
            return trials
        say(f"targets: recall {trials[-1]}, {recall:g} is asked for")
    best = max(trials, key=lambda trial: trial.recall)
    raise UserError(
        f"config.targets.recall: {recall:g} is asked for, the most of {len(trials)} ways to search was {best}. "
        f"What may help: {key_shards.search.backend.remedies}. To build targets from worse neighbors all the same, "
        f"set config.targets.recall to {np.floor(100 * best.recall) / 100:g}"
    )


def _trial(key_shards: KeyShards, sample: Sample, effort: Effort | None) -> Trial:
    backend = key_shards.search.backend
    bytes_read = effort.cost(key_shards.rows(0), key_shards.searched_width, backend.k) if effort else 0
    return Trial(effort, bytes_read, *sample.search(effort))


def _enough_for_one(sample: Sample, recall: float, efforts: Sequence[Effort], first: int) -> int:
    """The place of the first effort that reaches the recall in the first shard, or of the last one."""
    for place in range(first, len(efforts)):
        if sample.search(efforts[place], range(1))[0] >= recall:
            return place
    return len(efforts) - 1 if efforts else 0
