"""Goodput: what share of a training run's wall time, over all its restarts, went into optimizer steps that count.

The seconds since the record before are written to metrics.jsonl with every checkpoint. A run that resumes from a
checkpoint drops the records behind it, so that steps which are done again count once; the time they took the first time
lies between two records, like the time in which nothing ran.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

PHASES = ("start-up", "restore", "compile", "steps", "input wait", "validation", "checkpoint")
_SECONDS, _CLOCK = "seconds/", "clock"


class Stopwatch:
    """Gives every second since `began` (Unix time) to one of the phases."""

    def __init__(self, began: float):
        self._last = began
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._recorded = dict(self._seconds)

    def lap(self, phase: str) -> None:
        """What passed since the last lap belongs to `phase`."""
        now = time.time()
        self._seconds[phase] += now - self._last
        self._last = now

    def spent(self, *phases: str) -> float:
        """Seconds in these phases up to the last lap."""
        return sum(self._seconds[phase] for phase in phases)

    def record(self) -> dict[str, float]:
        """Seconds of each phase since the last record, and the time on the clock, for `MetricsWriter.write`."""
        values = {f"{_SECONDS}{phase}": seconds - self._recorded[phase] for phase, seconds in self._seconds.items()}
        self._recorded = dict(self._seconds)
        return values | {_CLOCK: self._last}


def summary(records: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Seconds of wall time by phase, summed over the records of metrics.jsonl; records without them are passed over.

    Two more keys: "between runs", what no phase accounts for, and "wall", the sum of all.
    """
    timed = [record for record in records if _CLOCK in record]
    seconds = {phase: sum(record[_SECONDS + phase] for record in timed) for phase in PHASES}
    first = timed[0][_CLOCK] - sum(timed[0][_SECONDS + phase] for phase in PHASES)
    wall = timed[-1][_CLOCK] - first
    return seconds | {"between runs": wall - sum(seconds.values()), "wall": wall}


def table(seconds: Mapping[str, float]) -> str:
    """A `summary` in words: the goodput, and where the rest went."""
    rest = ", ".join(
        f"{phase} {value:.1f} s" for phase, value in seconds.items() if phase not in ("steps", "wall") and value >= 0.05
    )
    return f"goodput {seconds['steps'] / seconds['wall']:.0%} of {seconds['wall']:.1f} s; the rest: {rest or 'nothing'}"
