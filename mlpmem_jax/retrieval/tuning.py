"""How hard an approximate search has to look: the cheapest way that reaches the recall that was asked for.

What is compared is bytes read for a query, not seconds: a build ends with the same bytes on any machine.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mlpmem_jax.core.errors import UserError
from mlpmem_jax.core.progress import say
from mlpmem_jax.retrieval.key_shards import KeyShards
from mlpmem_jax.retrieval.quality import Sample
from mlpmem_jax.retrieval.scann_index import Options

_REMEDIES = {
    "scann": "a larger config.targets.training_sample, other config.targets.leaves, backend=exact",
    "exact": "a larger config.targets.recall_target or search_dimensions",
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One way to search all key shards.

    Attributes:
      options: of ScaNN; None with another backend.
      bytes_read: by a query, in a shard of keys; 0 with another backend.
      recall: on the sample.
      packed_QxK: the sample's neighbors with their next tokens, as `neighbors.pack` does.
    """

    options: Options | None
    bytes_read: int
    recall: float
    packed_QxK: np.ndarray

    def summary(self, temperature: float, sample: Sample) -> dict[str, float]:
        """One point of the curve that a manifest keeps."""
        point = {"recall": self.recall, "total_variation": sample.total_variation(self.packed_QxK, temperature)}
        if self.options is None:
            return point
        settings = {"leaves_to_search": self.options.leaves_to_search, "reorder": self.options.reorder}
        return {**settings, "bytes_read": self.bytes_read, **point}


def reach(key_shards: KeyShards, sample: Sample, recall: float, backend: str) -> list[Trial]:
    """Tries searches, the cheapest first, up to one that reaches a recall; the shards are searched so from then on.

    Args:
      key_shards: with an index each.
      sample: queries with their true neighbors.
      recall: wanted, from 0 to 1.
      backend: "scann" or "exact", for what the error advises.

    Returns:
      What was tried; the last one reached the recall.

    Raises:
      UserError: none does.
    """
    efforts, trials = key_shards.efforts(), []
    if len(key_shards) > 1 and efforts:
        # Indices are large: one shard alone tells which efforts need not be tried on all of them.
        efforts = efforts[_enough_for_one(key_shards, sample, recall, efforts) :]
    keys = key_shards.rows(0), key_shards.searched_width, key_shards.candidates
    for options in efforts or [None]:
        if options is not None:
            key_shards.use(options)
        bytes_read = options.cost(*keys) if options else 0
        trials.append(Trial(options, bytes_read, *sample.search()))
        if trials[-1].recall >= recall:
            return trials
        say(f"targets: recall {trials[-1].recall:.3f}{_described(options)}, {recall:g} is asked for")
    best = max(trials, key=lambda trial: trial.recall)
    raise UserError(
        f"config.targets.recall: {recall:g} is asked for, the most of {len(trials)} ways to search was "
        f"{best.recall:.3f}{_described(best.options)}. What may help: {_REMEDIES[backend]}. To build targets from "
        f"worse neighbors all the same, set config.targets.recall to {np.floor(100 * best.recall) / 100:g}"
    )


def _enough_for_one(key_shards: KeyShards, sample: Sample, recall: float, efforts: list[Options]) -> int:
    """The place of the first effort that reaches the recall in the first shard, or of the last one."""
    for place, options in enumerate(efforts):
        key_shards.use(options)
        if sample.search(range(1))[0] >= recall:
            return place
    return len(efforts) - 1


def _described(options: Options | None) -> str:
    if options is None:
        return ""
    return f" with {options.leaves_to_search} of {options.leaves} leaves, {options.reorder:g} candidates a neighbor"
