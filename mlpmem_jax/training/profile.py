"""A trace of some training steps for TensorBoard and xprof: what the device did, and for which part of the model.

Operations carry the names of the scopes "input", "blocks", "loss" and "optimizer". On the host's own line each step is
one event "train" with its number, and reading its batch another, "input pipeline".
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
"""Of the artifact's folder: TensorBoard's own event files lie there too."""


class Profiler:
    """Traces the steps of one training that are asked for; a run that resumes after them traces nothing."""

    def __init__(self, folder: str, steps: range):
        self._folder, self._steps, self._written = folder, steps, None

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """The step of this number, as one event of the trace."""
        if number in self._steps and self._written is None:
            self._written = tempfile.mkdtemp(prefix="mlpmem_")
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every call of every Python function would bury the rest
            jax.profiler.start_trace(self._written, profiler_options=options)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def finish(self, number: int, results) -> None:
        """Ends the trace after its last step, once the device has the step's `results`."""
        if self._written is not None and self._steps and number >= self._steps[-1]:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Ends the trace, if one runs, and puts it where TensorBoard looks for it."""
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
