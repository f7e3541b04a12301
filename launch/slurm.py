"""GPU clusters with SLURM: one process per GPU, found by JAX through SLURM's environment. Submitted by `sbatch`."""

from __future__ import annotations

import argparse
import re
import shlex
import sys

from mlpmem_jax.core import config_files
from mlpmem_jax.core.errors import UserError

from . import job

_EXAMPLE = (
    "python -m launch.slurm --nodes=4 --gpus_per_node=8 --time=12:00:00 \\\n"
    "      --config=configs/wikitext103_gpt2_large.py --dry_run"
)
_WARNING_SECONDS = 300  # before the time limit: SIGTERM is sent, so that a checkpoint is written in time

_SCRIPT = """\
#!/bin/bash
{directives}
export MLPMEM_DISTRIBUTED=1
# A process whose GPU cannot be opened must fail, not train on its CPU.
export JAX_PLATFORMS=cuda
# A job that waits or restarts must use the config that was checked when it was submitted.
config="$PWD/{name}-$SLURM_JOB_ID.config.py"
cat > "$config" <<'END_OF_CONFIG'
{config_file}END_OF_CONFIG
# srun exits with the highest exit code of all processes, including those that it kills after the first failure. So a
# process that exits with {user_error}, a user error, records that in a file, because a restart would fail again.
export MLPMEM_USER_ERROR="{name}-$SLURM_JOB_ID.user_error"
status=0
srun --label --kill-on-bad-exit=1 --cpus-per-task={cpus} bash -c \
    'trap : TERM; "$@"; code=$?; [ "$code" -ne {user_error} ] || touch "$MLPMEM_USER_ERROR"; exit "$code"' bash \
    {command} "--config=$config" || status=$?
if [ -e "$MLPMEM_USER_ERROR" ]; then
    rm "$MLPMEM_USER_ERROR"
    exit {user_error}
fi
# Finished stages and steps are not repeated.
if [ "$status" -ne 0 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_restarts} ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def script(options: argparse.Namespace, config_file: str) -> str:
    """The batch script. Every process sees all GPUs of its node and JAX assigns it the one of its local rank, so GPUs
    are requested per node: SLURM's own binding (--gpus-per-task) would hide the GPU that JAX selects."""
    directives = {
        "job-name": options.name,
        "nodes": options.nodes,
        "ntasks-per-node": options.gpus_per_node,
        "gpus-per-node": options.gpus_per_node,
        "cpus-per-task": options.cpus_per_gpu,
        "mem": options.mem,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "output": f"{options.name}-%j.log",
        "open-mode": "append",
        "signal": f"TERM@{_WARNING_SECONDS}",
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in directives.items() if value is not None]
    if not re.fullmatch(r"\w[\w.-]*", options.name):
        raise UserError(f"--name={options.name}: expected letters, digits, '.', '_' and '-', first a letter or digit")
    return _SCRIPT.format(
        directives="\n".join([*lines, "#SBATCH --requeue"]),
        name=options.name,
        cpus=options.cpus_per_gpu,
        config_file=config_file,
        command=shlex.join([f"{options.venv}/bin/mlpmem", options.stage]),
        user_error=job.USER_ERROR,
        max_restarts=options.max_restarts,
    )


def _launch(options: argparse.Namespace, overrides: list[str]) -> int:
    for option, least in (("nodes", 1), ("gpus_per_node", 1), ("cpus_per_gpu", 1), ("max_restarts", 0)):
        if getattr(options, option) < least:
            raise UserError(f"--{option}={getattr(options, option)}: expected {least} or more")
    job.check_words(options, "mem", "time", "partition", "account")
    gpus = options.nodes * options.gpus_per_node
    config = job.read_config(options.config, overrides, stage=options.stage, devices=gpus, processes=gpus)
    text = script(options, job.config_file(config, options.config, overrides))
    print(f"{gpus} GPUs on {options.nodes} nodes: sbatch", file=sys.stderr)
    if options.dry_run:
        print(text, end="")
        return 0
    return job.send(["sbatch"], text)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `python -m launch.slurm`."""
    parser = job.parser("slurm", __doc__, _EXAMPLE)
    parser.add_argument("--name", default="mlpmem", help="name of the job (default mlpmem)")
    parser.add_argument("--nodes", type=int, required=True, help="machines")
    parser.add_argument("--gpus_per_node", type=int, required=True, help="GPUs, and processes, per machine")
    parser.add_argument("--cpus_per_gpu", type=int, default=8, help="cores per process, e.g. for ScaNN (default 8)")
    parser.add_argument("--mem", default="0", help="memory per machine, e.g. 512G (default 0: all of it)")
    parser.add_argument("--time", required=True, metavar="HH:MM:SS", help="time limit of one attempt")
    parser.add_argument("--partition", help="partition of the cluster (default: the cluster's)")
    parser.add_argument("--account", help="account to charge (default: the cluster's)")
    parser.add_argument(
        "--venv",
        default=".venv",
        type=config_files.path_option,
        help="virtual environment on the shared disk, with jax[cuda13] (default .venv)",
    )
    parser.add_argument(
        "--max_restarts", type=int, default=10, help="maximum restarts after failures and time limits (default 10)"
    )
    job.run(parser, _launch, arguments)


if __name__ == "__main__":
    main()
