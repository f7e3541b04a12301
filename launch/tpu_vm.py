"""TPU slices without Kubernetes: a queued resource whose VMs start the job when they boot. Submitted by `gcloud`."""

from __future__ import annotations

import argparse
import shlex

from mlpmem_jax.core import accelerators

from . import job

_EXAMPLE = (
    "python -m launch.tpu_vm --name=memory --accelerator=v5litepod-64 --zone=us-west4-a --image=IMAGE \\\n"
    "      --config=configs/wikitext103_gpt2_large.py --config.workdir=gs://BUCKET/memory --dry_run"
)
_LONGEST_NAME = 40
_ENVIRONMENT = {"MLPMEM_DISTRIBUTED": "1", "JAX_PLATFORMS": "tpu,cpu"}
_STARTUP_SCRIPT = """\
#!/bin/bash
# Runs as root at every boot of every VM, so also after maintenance; finished stages are skipped.
set -euo pipefail
export HOME=/root PATH=$PATH:/snap/bin
mkdir -p /etc/mlpmem
cat > /etc/mlpmem/config.py <<'END_OF_CONFIG'
{config_file}END_OF_CONFIG
{login}docker rm --force mlpmem 2> /dev/null || true
docker run --detach --name=mlpmem --restart={restart} --stop-timeout={grace} --privileged --network=host \\
    --volume=/etc/mlpmem:/etc/mlpmem:ro {environment} \\
    --entrypoint=tini {image} -g -- sh -c {wrapper} sh {stage} --config=/etc/mlpmem/config.py
"""
# Docker restarts a container that exits with any code but 0. `tini -g` sends SIGTERM to the shell and to mlpmem.
_WRAPPER = (
    f'trap : TERM; mlpmem "$@"; code=$?; [ "$code" -ne {job.USER_ERROR} ] || '
    f'{{ echo "exit code {job.USER_ERROR}, a user error: not restarted" >&2; code=0; }}; exit "$code"'
)


def startup_script(options: argparse.Namespace, config_file: str) -> str:
    """The script that every VM runs at boot: starts the container, which Docker restarts when it fails."""
    registry = options.image.split("/")[0]
    environment = job.environment(_ENVIRONMENT, options.env)
    is_google = registry.endswith((".pkg.dev", "gcr.io"))
    return _STARTUP_SCRIPT.format(
        config_file=config_file,
        login=f"gcloud auth configure-docker {shlex.quote(registry)} --quiet\n" if is_google else "",
        restart=f"on-failure:{options.max_restarts}" if options.max_restarts else "no",
        environment=shlex.join(f"--env={name}={value}" for name, value in environment.items()),
        grace=job.GRACE_SECONDS,
        wrapper=shlex.quote(_WRAPPER),
        image=shlex.quote(options.image),
        stage=options.stage,
    )


def command(options: argparse.Namespace, tpu: accelerators.Slice) -> list[str]:
    """The request for capacity. The startup script is read from standard input."""
    # Outside its alpha track gcloud accepts --type only for v2, v3 and v4.
    track = [] if tpu.has_default_topology else ["alpha"]
    words = ["gcloud", *track, "compute", "tpus", "queued-resources", "create", options.name, f"--zone={options.zone}"]
    if options.project:
        words.append(f"--project={options.project}")
    if tpu.has_default_topology:
        words.append(f"--accelerator-type={tpu.accelerator_type}")
    else:
        words += [f"--type={tpu.generation.prefix}", f"--topology={tpu.topology}"]
    words.append(f"--runtime-version={tpu.generation.runtime_version}")
    if options.slices == 1:
        words.append(f"--node-id={options.name}")
    else:
        words += [f"--node-count={options.slices}", f"--node-prefix={options.name}"]
    if options.service_account:
        words.append(f"--service-account={options.service_account}")
    if options.spot:
        words.append("--spot")
    return [*words, "--metadata-from-file=startup-script=/dev/stdin"]


def _launch(options: argparse.Namespace, overrides: list[str]) -> int:
    job.check_words(options, "zone", "project")
    tpu, config = job.read_tpu_job(options, overrides, _LONGEST_NAME)
    words, script = command(options, tpu), startup_script(options, job.config_file(config, options.config, overrides))
    if options.dry_run:
        print(f"{shlex.join(words)} <<'END_OF_SCRIPT'\n{script}END_OF_SCRIPT")
        return 0
    return job.send(words, script)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `python -m launch.tpu_vm`."""
    parser = job.parser("tpu_vm", __doc__, _EXAMPLE)
    job.add_tpu_options(parser)
    parser.add_argument("--zone", required=True, help="Google Cloud zone, e.g. us-west4-a")
    parser.add_argument("--project", help="Google Cloud project (default: gcloud's)")
    job.run(parser, _launch, arguments)


if __name__ == "__main__":
    main()
