"""Writes the tasks of a sweep as jobs for `launch/`: one config and one command per task, one script per level.

Tasks depend only on tasks of earlier levels, so all jobs of a script may run at once. Finished tasks are left out; if
jobs fail, run the command again to write scripts for what is left.
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
# {count} jobs of the sweep {sweep}. Run this {when}, with options for {launcher}, for example
#   sh {script} {example}
# --dry_run prints what would be submitted.
set -e
"""


def write(sweep: Sweep, kind: str) -> list[pathlib.Path]:
    """Writes scripts and configs for every unfinished task into runs/launch/SWEEP, and links into the workdir.

    Args:
      sweep: a checked sweep.
      kind: the launcher of `launch/`: "jobset" or "slurm".

    Returns:
      The scripts, in the order in which to run them.
    """
    folder = FOLDER / sweep.name
    if folder.exists():
        shutil.rmtree(folder)  # jobs that have finished since must not be submitted again
    folder.mkdir(parents=True)
    left = [task for task in of_sweep(sweep) if not task.is_finished()]
    scripts = []
    for number, level in enumerate(_LEVELS):
        members = [task for task in left if (task.verb if task.verb in SHARED else "points") == level]
        if not members:
            continue
        script = folder / f"{number}-{level}.sh"
        when = f"after every job of {scripts[-1].name} has succeeded" if scripts else "first"
        head = _HEAD.format(
            count=len(members),
            sweep=sweep.name,
            when=when,
            launcher=f"{LAUNCHERS}.{kind}",
            script=script,
            example=_EXAMPLES[kind],
        )
        script.write_text(head + "".join(_command(task, kind, folder) for task in members))
        scripts.append(script)
    for script in scripts:
        say(f"sh {script} {_EXAMPLES[kind]}")
    say("then run the same mlpmem sweep without --launch to write points.csv" if scripts else "every task is finished")
    return scripts


def _command(task: SweepTask, kind: str, folder: pathlib.Path) -> str:
    """The shell line that submits a task's job; the caller's options come last."""
    config = folder / f"{task.name}.py"
    config.write_text(task.prepare())
    # Kubernetes names stay taken until the job is deleted, so another config of the same point needs another name.
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
