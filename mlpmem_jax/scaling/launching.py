"""Writes the tasks of a sweep as jobs for `launch/`: one config and one command each, a script for each level.

Tasks of a level need those of the levels before and nothing of their own level, so all jobs of a script may run at
once. Finished tasks are left out; run again when jobs have failed, what is left is written.
"""

from __future__ import annotations

import hashlib
import pathlib
import shlex
import shutil
import sys

from mlpmem_jax.core.installation import LAUNCHERS
from mlpmem_jax.core.progress import say
from mlpmem_jax.scaling.sweep import Sweep
from mlpmem_jax.scaling.tasks import SHARED, SweepTask, of_sweep

FOLDER = pathlib.Path("runs/launch")
_LEVELS = (*SHARED, "points")
_EXAMPLES = {
    "jobset": "--accelerator=v5p-128 --image=IMAGE --service_account=ACCOUNT",
    "slurm": "--nodes=4 --gpus_per_node=8 --time=12:00:00",
}
_HEAD = """\
#!/bin/sh
# {count} jobs of the sweep {sweep}. Run this when {before}, with the options of {launcher}, for example
#   sh {script} {example}
# --dry_run prints what would be sent.
set -e
"""


def write(sweep: Sweep, kind: str) -> list[pathlib.Path]:
    """Writes the scripts and configs of every unfinished task into runs/launch/SWEEP, and the links into the workdir.

    Args:
      sweep: a checked sweep.
      kind: launcher of `launch/`: "jobset" or "slurm".

    Returns:
      The scripts, in the order in which they are to be run.
    """
    folder = FOLDER / sweep.name
    if folder.exists():
        shutil.rmtree(folder)  # jobs that have finished since must not be sent again
    folder.mkdir(parents=True)
    left = [task for task in of_sweep(sweep) if not task.is_finished()]
    scripts = []
    for number, level in enumerate(_LEVELS):
        members = [task for task in left if (task.verb if task.verb in SHARED else "points") == level]
        if not members:
            continue
        script = folder / f"{number}-{level}.sh"
        before = f"every job of {scripts[-1].name} has succeeded" if scripts else "nothing else is needed"
        head = _HEAD.format(
            count=len(members),
            sweep=sweep.name,
            before=before,
            launcher=f"{LAUNCHERS}.{kind}",
            script=script,
            example=_EXAMPLES[kind],
        )
        script.write_text(head + "".join(_command(task, kind, folder) for task in members))
        scripts.append(script)
    for script in scripts:
        say(f"sh {script} {_EXAMPLES[kind]}")
    say("then, for points.csv: the same mlpmem sweep without --launch" if scripts else "every task is finished")
    return scripts


def _command(task: SweepTask, kind: str, folder: pathlib.Path) -> str:
    """The line that sends a task's job; the caller's options come last."""
    config = folder / f"{task.name}.py"
    config.write_text(task.prepare())
    # A name of Kubernetes is taken until it is deleted: another config of the same point is another job.
    name = f"{task.name}-{hashlib.sha256(config.read_bytes()).hexdigest()[:6]}"
    words = [
        sys.executable,
        "-m",
        f"{LAUNCHERS}.{kind}",
        f"--name={name}",
        f"--stage={task.verb}",
        f"--config={config}",
    ]
    return f'{shlex.join(words)} "$@"\n'
