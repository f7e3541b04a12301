"""The cost of a stage, its seconds and peak memory, recorded in WORKDIR/stages.jsonl."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator

import jax
from etils import epath

from mlpmem_jax.core import host, json_lines

_FILE = "stages.jsonl"
_start_times: list[float] = []  # Unix times at which the stages of this process began, and since which trainings count


def start_time() -> float:
    """Unix time at which the current stage, or what follows the last `restart`, began; the first stage begins with
    the process."""
    return _start_times[-1] if _start_times else time.time()


def restart() -> None:
    """Makes `start_time` now: what the stage did so far has been accounted for."""
    _start_times.append(time.time())


@contextlib.contextmanager
def measured(workdir: str, stage: str) -> Iterator[None]:
    """Records seconds and peak memory of a stage in WORKDIR/stages.jsonl, even if it fails."""
    host.reset_peak()
    start = time.perf_counter()
    _start_times.append(time.time() if _start_times else time.time() - host.process_age())
    try:
        yield
    finally:
        if jax.process_index() == 0:
            record = {"stage": stage, "seconds": time.perf_counter() - start, "peak_rss_bytes": host.peak_rss_bytes()}
            # The stage's own error matters more than a full disk here.
            with contextlib.suppress(OSError):
                file = epath.Path(workdir) / _FILE
                file.parent.mkdir(parents=True, exist_ok=True)
                before = file.read_bytes() if file.exists() else b""
                partial = file.with_suffix(".partial")
                partial.write_bytes(before + json.dumps(record).encode() + b"\n")
                partial.replace(file)


def totals(workdir) -> dict[str, dict]:
    """{'seconds': {stage: sum}, 'peak_rss_bytes': {stage: maximum}} over all runs of each stage."""
    seconds, peaks = {}, {}
    for record in json_lines.read(epath.Path(workdir) / _FILE):
        if not record.keys() >= {"stage", "seconds", "peak_rss_bytes"}:  # edited
            continue
        stage = record["stage"]
        seconds[stage] = seconds.get(stage, 0.0) + record["seconds"]
        peaks[stage] = max(peaks.get(stage, 0), record["peak_rss_bytes"])
    return {"seconds": seconds, "peak_rss_bytes": peaks}
