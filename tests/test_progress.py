"""Progress in a log file: done, rate and time left, also of work that takes half a minute a piece."""

import time

import pytest

from mlpmem_jax.core.progress import progress


@pytest.mark.parametrize(
    ("amount", "rate", "left"), [(2048, "81.9 positions/s", "48 s"), (1, "0.04 positions/s", "149,975 s")]
)
def test_a_line_says_rate_and_time_left(capsys, monkeypatch, amount, rate, left):
    clock = [0.0]
    monkeypatch.setenv("MLPMEM_QUIET", "0")
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with progress(6000, "datastore", "positions") as lines:
        clock[0] = 25.0
        lines.advance(amount)
        line = capsys.readouterr().err
        assert line == f"datastore: {amount:,} of 6,000 positions, {rate}, {left} left\n"
    assert capsys.readouterr().err == f"datastore: {amount:,} positions in 25.0 s ({rate})\n"
