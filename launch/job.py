"""Shared by all launchers: reads the config, checks it against the devices, and passes a document to a command."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

import ml_collections

from mlpmem_jax import stages
from mlpmem_jax.core import accelerators, config_files, failures, preflight
from mlpmem_jax.core.config import INPUTS, LOCAL, as_config_file, value_of
from mlpmem_jax.core.errors import ConfigError, Stopped, UserError

USER_ERROR = UserError.exit_code
"""Exit code of `mlpmem` for invalid input. A restart would fail again."""

STOPPED = Stopped.exit_code
"""Exit code of `mlpmem` if it was preempted or lost another process of the job."""

GRACE_SECONDS = 300
"""From SIGTERM to SIGKILL: time for a checkpoint of all hosts together."""


def parser(name: str, description: str, example: str) -> argparse.ArgumentParser:
    """The options that all launchers share. `run` handles overrides (--config.key=value)."""
    result = argparse.ArgumentParser(
        prog=f"python -m {__package__}.{name}",
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument(
        "--config",
        required=True,
        type=config_files.path_option,
        metavar="FILE",
        help="a config; --config.key=value overrides it",
    )
    choices = ["run", "controls", "continued", "compare", *stages.STAGES]
    result.add_argument("--stage", default="run", choices=choices, metavar="STAGE", help="verb of mlpmem (default run)")
    result.add_argument(
        "--dry_run", action="store_true", help="print exactly what would be submitted, and submit nothing"
    )
    return result


def add_tpu_options(result: argparse.ArgumentParser) -> None:
    """The options that the launchers of TPU slices share."""
    result.add_argument("--name", required=True, help="name of the job")
    result.add_argument("--accelerator", required=True, metavar="TYPE", help="e.g. v5litepod-256, v5p-256 or v5p:4x4x8")
    result.add_argument(
        "--slices", type=int, default=1, help="number of slices, connected by the data-center network (default 1)"
    )
    result.add_argument("--image", required=True, help="container image built from launch/Dockerfile")
    result.add_argument("--service_account", help="service account that may read and write config.workdir")
    result.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="environment variable of the container, e.g. MLPMEM_JOIN_SECONDS=1800; may be repeated",
    )
    result.add_argument("--spot", action="store_true", help="use cheaper capacity that may be reclaimed")
    result.add_argument("--max_restarts", type=int, default=10, help="maximum restarts after failures (default 10)")


def run(
    result: argparse.ArgumentParser,
    launch: Callable[[argparse.Namespace, list[str]], int],
    arguments: list[str] | None,
) -> None:
    """Parses the arguments and exits with what launch(options, overrides) returns, or with 2 and one clear error."""
    failures.print_anything()
    options, overrides = result.parse_known_args(arguments)
    with failures.reported(result.prog):
        sys.exit(launch(options, config_files.joined(overrides)))


def check_words(options: argparse.Namespace, *names: str) -> None:
    """Checks that options, unless they are absent, are single words: others would end up as several, or as none.

    Raises:
      UserError: names the option.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not re.fullmatch(r"\S+", value):
            raise UserError(f"--{name}={value}: expected a word without spaces")


def environment(own: Mapping[str, str], given: Sequence[str]) -> dict[str, str]:
    """The environment variables of a container.

    Args:
      own: those that the launcher sets.
      given: values of --env, NAME=VALUE.

    Raises:
      UserError: a value of --env is not of that form, or names a variable that the launcher sets.
    """
    variables = dict(own)
    for text in given:
        name, _, value = text.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*=.*", text) or not value.isprintable():
            raise UserError(
                f"--env={text!a}: expected NAME=VALUE, a name of letters, digits and '_', and a single line"
            )
        if name in own:
            raise UserError(f"--env={text}: this launcher sets {name}={own[name]} itself")
        variables[name] = value
    return variables


def read_config(
    file: str, overrides: list[str], *, stage: str, devices: int, processes: int, slices: int = 1
) -> ml_collections.ConfigDict:
    """The resolved config, checked by itself and against the job's devices.

    Raises:
      ConfigError: a key is wrong, or the mesh or a batch is not divisible by the devices.
    """
    config = config_files.read(file, overrides)
    sizes = preflight.mesh_sizes(config, devices)
    if sizes["slice"] % slices:
        raise ConfigError(
            f"config.mesh.slice: expected a multiple of --slices={slices}, so that the other axes stay inside a slice, "
            f"found {sizes['slice']}; add --config.mesh.slice={slices}"
        )
    preflight.check_devices(config, devices, processes, stage)
    preflight.check_models(config, devices)
    if "://" not in config.workdir:  # the job itself checks buckets, which this machine need not reach
        preflight.check_artifacts(config)
    return config


def read_tpu_job(
    options: argparse.Namespace, overrides: list[str], longest_name: int
) -> tuple[accelerators.Slice, ml_collections.ConfigDict]:
    """The slice and the checked config of a job on TPU slices.

    Raises:
      UserError: the slice does not exist, the service would refuse the name, or the config cannot work there.
    """
    if len(options.name) > longest_name or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", options.name):
        raise UserError(
            f"--name={options.name}: expected lowercase letters, digits and '-', first a letter, last not '-', "
            f"at most {longest_name} characters"
        )
    for option, least in (("slices", 1), ("max_restarts", 0)):
        if getattr(options, option) < least:
            raise UserError(f"--{option}={getattr(options, option)}: expected {least} or more")
    check_words(options, "image", "service_account")
    tpu = accelerators.resolve(options.accelerator)
    hosts = tpu.hosts * options.slices
    config = read_config(
        options.config,
        overrides,
        stage=options.stage,
        devices=tpu.chips * options.slices,
        processes=hosts,
        slices=options.slices,
    )
    if "://" not in config.workdir:
        raise ConfigError(
            f"config.workdir: {config.workdir!r} would be lost with the machines that wrote it; use a place that all "
            "hosts share and that outlives them, e.g. --config.workdir=gs://BUCKET/RUN"
        )
    for key in (*INPUTS, *LOCAL) if options.stage == "compare" else INPUTS:
        place = value_of(config, key)
        if place.startswith(("/", ".")) or ("://" not in place and os.path.exists(place)):
            print(f"warning: config.{key}: {place} is a local path; the hosts need it in their image", file=sys.stderr)
    return tpu, config


def config_file(config: ml_collections.ConfigDict, file: str, overrides: list[str]) -> str:
    """The resolved config as a self-contained config file, so that what runs is what was checked here."""
    source = shlex.join([f"--config={file}", *overrides])
    return as_config_file(config, f"Resolved when the job was launched, from {source}")


def send(command: list[str], document: str) -> int:
    """Runs the command with the document on its standard input and returns its exit code.

    Raises:
      UserError: the command is not installed.
    """
    _check_installed(command[0])
    return subprocess.run(command, input=document, text=True, check=False).returncode


def ask(command: list[str]) -> str:
    """Runs the command and returns its standard output.

    Raises:
      UserError: the command is not installed.
    """
    _check_installed(command[0])
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False)
    return done.stdout


def _check_installed(name: str) -> None:
    if shutil.which(name) is None:
        raise UserError(f"the command {name!r} is not installed; --dry_run prints what it would receive")
