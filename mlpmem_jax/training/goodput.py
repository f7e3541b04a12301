"""Goodput: the share of a training run's wall time, over all restarts, that went into optimizer steps that were kept.

With every checkpoint, the seconds since the previous record are written to metrics.jsonl. A run that resumes from a
checkpoint drops later records, so repeated steps count once; the time of their first execution counts as time between
runs, like the time in which nothing ran.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

PHASES = ("start-up", "restore", "compile", "steps", "input wait", "validation", "checkpoint")
_SECONDS, _CLOCK = "seconds/", "clock"


class Stopwatch:
    """Assigns every second since `began` (Unix time) to one of the phases."""

    def __init__(self, began: float):
        self._last = began
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._recorded = dict(self._seconds)

    def lap(self, phase: str) -> None:
        """Assigns the time since the last lap to `phase`."""
        now = time.time()
        self._seconds[phase] += now - self._last
        self._last = now

    def spent(self, *phases: str) -> float:
        """Seconds in these phases up to the last lap."""
        return sum(self._seconds[phase] for phase in phases)

    def record(self) -> dict[str, float]:
        """Seconds of each phase since the last record, and the current time, for `MetricsWriter.write`."""
        values = {f"{_SECONDS}{phase}": seconds - self._recorded[phase] for phase, seconds in self._seconds.items()}
        self._recorded = dict(self._seconds)
        return values | {_CLOCK: self._last}


def summary(records: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Seconds of wall time by phase, summed over the records of metrics.jsonl; other records are ignored.

    Two more keys: "between runs", time not assigned to any phase, and "wall", the total.
    """
    timed = [record for record in records if _CLOCK in record]
    seconds = {phase: sum(record[_SECONDS + phase] for record in timed) for phase in PHASES}
    first = timed[0][_CLOCK] - sum(timed[0][_SECONDS + phase] for phase in PHASES)
    wall = timed[-1][_CLOCK] - first
    return seconds | {"between runs": wall - sum(seconds.values()), "wall": wall}


def table(seconds: Mapping[str, float]) -> str:
    """Describes a `summary`: the goodput, and what the rest of the time was spent on."""
    rest = ", ".join(
        f"{phase} {value:.1f} s" for phase, value in seconds.items() if phase not in ("steps", "wall") and value >= 0.05
    )
    return f"goodput {seconds['steps'] / seconds['wall']:.0%} of {seconds['wall']:.1f} s; the rest: {rest or 'nothing'}"
