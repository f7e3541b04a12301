"""Progress: bars with rate and remaining time on a terminal, occasional lines in a log file, or silence."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator

import rich.console
import rich.live
import rich.progress

_console = rich.console.Console(stderr=True, highlight=False)
_LOG_INTERVAL_SECONDS = 15.0


def _is_silent() -> bool:
    """True when MLPMEM_QUIET is set or this is not the first process of the job."""
    if os.environ.get("MLPMEM_QUIET", "0") != "0":
        return True
    jax = sys.modules.get("jax")  # a process that has not imported jax is not part of a job
    return jax is not None and jax.distributed.is_initialized() and jax.process_index() != 0


def say(text: str) -> None:
    """Prints one line for the user, on the first process only."""
    if not _is_silent():
        _console.print(text, markup=False, soft_wrap=True)


@contextlib.contextmanager
def live(render: Callable[[], rich.console.RenderableType]) -> Iterator[bool]:
    """Shows the result of `render` on a terminal, updated twice a second; yields whether there is a terminal."""
    if _is_silent() or not _console.is_terminal:
        yield False
        return
    with rich.live.Live(get_renderable=render, console=_console, refresh_per_second=2):
        yield True


def _rate_text(rate: float) -> str:
    """Rates per second; two digits where they are small, as of trainings whose steps take half a minute."""
    return f"{rate:,.1f}" if rate >= 1 else f"{rate:.2g}"


class _LogLines:
    """Progress in a log file: a line every few seconds and one at the end."""

    def __init__(self, total: float, description: str, unit: str, initial: float):
        self._total, self._description, self._unit = total, description, unit
        self._initial = self._done = initial
        self._start = self._last = time.monotonic()

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._last < _LOG_INTERVAL_SECONDS:
            return
        self._last = now
        rate = (self._done - self._initial) / (now - self._start)
        left = (self._total - self._done) / rate if rate > 0 else float("inf")
        say(
            f"{self._description}: {self._done:,.0f} of {self._total:,.0f} {self._unit}, "
            f"{_rate_text(rate)} {self._unit}/s, {left:,.0f} s left {note}".rstrip()
        )

    def close(self) -> None:
        seconds = time.monotonic() - self._start
        done = self._done - self._initial
        rate = done / seconds if seconds > 0 else 0.0
        say(f"{self._description}: {done:,.0f} {self._unit} in {seconds:,.1f} s ({_rate_text(rate)} {self._unit}/s)")


class _Bar:
    """Progress on a terminal, drawn by rich."""

    def __init__(self, progress: rich.progress.Progress, task: rich.progress.TaskID, initial: float):
        self._progress, self._task = progress, task
        self._start, self._initial, self._done = time.monotonic(), initial, initial

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._done += amount
        rate = (self._done - self._initial) / max(time.monotonic() - self._start, 1e-9)
        self._progress.update(self._task, advance=amount, rate=_rate_text(rate), note=note)


class _Silent:
    def advance(self, amount: float = 1, note: str = "") -> None:
        """Nothing is shown."""


@contextlib.contextmanager
def progress(total: float, description: str, unit: str, initial: float = 0) -> Iterator[_Bar | _LogLines | _Silent]:
    """A progress display for one long loop.

    Args:
      total: amount of work in `unit`, of which `initial` is already done.
      description: a few words on what is being done.
      unit: plural noun for the counted items, e.g. "positions".

    Yields:
      An object with `advance(amount, note="")`; `note` is shown next to the bar (such as a loss).
    """
    if _is_silent():
        yield _Silent()
    elif not _console.is_terminal:
        lines = _LogLines(total, description, unit, initial)
        yield lines
        lines.close()
    else:
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn(f"{{task.fields[rate]}} {unit}/s"),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[note]}"),
        )
        with rich.progress.Progress(*columns, console=_console) as bars:
            task = bars.add_task(description, total=total, completed=initial, rate="-", note="")
            yield _Bar(bars, task, initial)
