"""The lines of `mlpmem benchmark`, and the times in them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import jax
import numpy as np


def row(name: str, value: float, unit: str, detail: str) -> dict:
    """One measurement: its name, value and unit, and details of how it was measured."""
    return {"name": name, "value": float(value), "unit": unit, "detail": detail}


def seconds_by_round(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each call in every round, float64 [rounds], until its arrays are computed.

    Each round runs all calls, so that other load affects them equally; a first run of each, which compiles, does not
    count.
    """
    for call in calls.values():
        jax.block_until_ready(call())
    seconds = {name: np.zeros(rounds) for name in calls}
    for number in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name][number] = time.perf_counter() - start
    return seconds
