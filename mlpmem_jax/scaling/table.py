"""The points of a running sweep, as a live table on a terminal and as single lines in a log."""

from __future__ import annotations

import rich.table

from mlpmem_jax.evaluation import wording
from mlpmem_jax.scaling import collection
from mlpmem_jax.scaling.sweep import Point, Sweep
from mlpmem_jax.scaling.tasks import SweepTask

_COLORS = {"runs": "cyan", "finished": "green", "failed": "red", "skipped": "red"}


class Rows:
    """The rows that show a sweep's progress.

    Args:
      sweep: the sweep, whose points are the rows.
      tasks: the sweep's tasks.
      states: task -> `runner.State`, updated while the sweep runs.
    """

    def __init__(self, sweep: Sweep, tasks: list[SweepTask], states: dict):
        self._sweep, self._states = sweep, states
        self._tasks = {task.name: task for task in tasks}
        self._perplexities: dict[str, float] = {}

    @property
    def finished(self) -> int:
        """Number of finished tasks."""
        return sum(state.phase == "finished" for state in self._states.values())

    def render(self) -> rich.table.Table:
        """The table in its current state."""
        caption = f"{self.finished} of {len(self._tasks)} tasks finished"
        drawn = rich.table.Table(title=self._sweep.name, caption=caption)
        for name, justify in (
            *(("point", "left"), ("arm", "left"), ("seed", "right"), ("FLOPs", "right"), ("steps", "right")),
            *(("state", "left"), ("seconds", "right"), ("perplexity", "right")),
        ):
            drawn.add_column(name, justify=justify)
        for point in self._sweep.points:
            state, words = self._words(point)
            color = _COLORS.get(state.phase, "default")
            seconds = f"{state.seconds:,.0f}" if state.seconds else ""
            steps = f"{point.config.training.steps:,}"
            drawn.add_row(
                *(point.name, point.label, str(point.seed), f"{point.flops:.3g}", steps),
                *(f"[{color}]{words}[/{color}]", seconds, self._perplexity(point)),
            )
        return drawn

    def line(self, task: SweepTask) -> str:
        """One log line about a task that has just started or ended."""
        state = self._states[task.name]
        text = f"[{self.finished} of {len(self._tasks)}] {task.name} {state.phase}"
        if state.phase == "runs":
            return text
        text += f" after {state.seconds:,.0f} s"
        if state.phase == "failed":
            return f"{text}: {state.reason}"
        points = [point for point in self._sweep.points if point.name == task.name]
        return f"{text}, perplexity {self._perplexity(points[0])}" if points else text

    def _words(self, point: Point) -> tuple:
        """The most informative state of a point, in words: its own, or that of a task it waits for."""
        task = self._tasks[point.name]
        state = self._states[point.name]
        if state.phase not in ("waits", "skipped"):
            return state, state.phase
        while task.needs:
            task = self._tasks[task.needs[0]]
            needed = self._states[task.name]
            if needed.phase in ("runs", "failed"):
                return needed, f"{task.verb} {needed.phase}"
        return state, state.phase

    def _perplexity(self, point: Point) -> str:
        if self._states[point.name].phase != "finished":
            return ""
        if point.name not in self._perplexities:
            self._perplexities[point.name] = collection.row(self._sweep, point)["perplexity"]
        return wording.number(self._perplexities[point.name])
