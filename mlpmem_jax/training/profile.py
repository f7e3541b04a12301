"""A trace of some training steps for TensorBoard and xprof: device activity by part of the model.

Operations are named by the scopes "input", "blocks", "loss" and "optimizer". On the host's timeline each step is an
event "train" with its number, and reading its batch is an event "input pipeline".
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator

import jax
from etils import epath

from mlpmem_jax.core.progress import say

FOLDER = "tensorboard"
"""Folder within the artifact's folder, where TensorBoard's event files are too."""


class Profiler:
    """Traces the requested steps of a training; a run that resumes after them traces nothing."""

    def __init__(self, folder: str, steps: range):
        self._folder, self._steps, self._written = folder, steps, None

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Records step `number` as one event of the trace."""
        if number in self._steps and self._written is None:
            self._written = tempfile.mkdtemp(prefix="mlpmem_")
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # tracing every Python call would bury the rest
            jax.profiler.start_trace(self._written, profiler_options=options)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def finish(self, number: int, results) -> None:
        """Ends the trace after its last step, once the device has the step's `results`."""
        if self._written is not None and self._steps and number >= self._steps[-1]:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Ends the trace, if one is running, and moves it to where TensorBoard looks for it."""
        if self._written is None:
            return
        jax.profiler.stop_trace()
        target = epath.Path(self._folder) / FOLDER
        for file in sorted(epath.Path(self._written).glob("plugins/profile/*/*")):
            copy = target / file.relative_to(self._written)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
        shutil.rmtree(self._written)
        self._written, self._steps = None, range(0)
        say(f"trace of the profiled steps: tensorboard --logdir={target} (packages tensorboard and xprof)")
