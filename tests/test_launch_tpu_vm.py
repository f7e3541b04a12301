"""The gcloud command and the startup script, run with stand-ins for gcloud and docker."""

import os
import pathlib
import shlex
import signal
import subprocess

import pytest

from launch import tpu_vm
from mlpmem_jax.core import config_files

ROOT = pathlib.Path(__file__).parents[1]
BASE = ["--name=memory", "--zone=us-west4-a", f"--config={ROOT}/configs/default.py", "--config.workdir=gs://b/r"]
BATCH = [f"--config.{name}.batch_sequences=256" for name in ("datastore", "training", "base.training")]
BATCH += ["--config.mesh.rules.embed="]  # parameters of these widths are not divided by so many devices


@pytest.fixture(autouse=True)
def no_real_commands(tmp_path, monkeypatch):
    """A test that fails must not reach a real gcloud of the machine it runs on."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Makes commands that write their words, and what they are sent, beside themselves."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def make(name, code=0):
        file = tmp_path / "bin" / name
        file.write_text(
            f'#!/bin/sh\necho "$@" >> {tmp_path}/{name}.words\n/bin/cat > {tmp_path}/{name}.sent\nexit {code}\n'
        )
        file.chmod(0o755)

    return make


def printed(capsys, *arguments) -> tuple[list[str], str]:
    with pytest.raises(SystemExit) as end:
        tpu_vm.main([*BASE, *arguments, "--dry_run"])
    output = capsys.readouterr()
    assert end.value.code == 0, output.err
    command, _, rest = output.out.partition(" <<'END_OF_SCRIPT'\n")
    return shlex.split(command), rest.removesuffix("END_OF_SCRIPT\n")


def test_one_slice(capsys):
    command, _ = printed(capsys, "--accelerator=v5e:4x4", "--image=I", "--spot", "--project=p", "--service_account=s")
    assert command[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "memory"]
    assert set(command[6:]) == {
        *("--zone=us-west4-a", "--project=p", "--accelerator-type=v5litepod-16", "--node-id=memory", "--spot"),
        *("--runtime-version=v2-alpha-tpuv5-lite", "--service-account=s"),
        "--metadata-from-file=startup-script=/dev/stdin",
    }


def test_several_slices_of_a_chosen_topology(capsys):
    arguments = ["--accelerator=v5p:4x4x16", "--slices=4", "--image=I", "--config.mesh.slice=4"]
    batches = [word.replace("=256", "=1024") for word in BATCH]
    command, _ = printed(capsys, *arguments, *batches)
    assert command[:3] == ["gcloud", "alpha", "compute"]
    assert {"--type=v5p", "--topology=4x4x16", "--node-count=4", "--node-prefix=memory"} <= set(command)
    assert not any(word.startswith(("--accelerator-type", "--node-id")) for word in command)


def test_the_startup_script_starts_the_container_with_the_checked_config(capsys, tmp_path, stand_in):
    image = "us-docker.pkg.dev/p/r/mlpmem:1"
    arguments = ["--accelerator=v5e-16", f"--image={image}", "--max_restarts=3", "--config.targets.k=77"]
    _, script = printed(capsys, *arguments)
    for command in ("gcloud", "docker"):
        stand_in(command)
    for command in ("mkdir", "cat"):
        (tmp_path / "bin" / command).symlink_to(f"/bin/{command}")
    file = tmp_path / "startup.sh"
    file.write_text(script.replace("/etc/mlpmem", str(tmp_path / "etc")))
    for _ in range(2):  # at every boot
        subprocess.run(["/bin/bash", file], stdin=subprocess.DEVNULL, check=True)
    assert config_files.read(str(tmp_path / "etc" / "config.py"), []).targets.k == 77
    assert (tmp_path / "gcloud.words").read_text().splitlines()[0] == "auth configure-docker us-docker.pkg.dev --quiet"
    removed, started = (tmp_path / "docker.words").read_text().splitlines()[:2]
    assert removed == "rm --force mlpmem"
    assert started.endswith(f"sh run --config={tmp_path}/etc/config.py")
    words = {"--restart=on-failure:3", "--privileged", "--network=host", "--env=MLPMEM_DISTRIBUTED=1", image}
    assert words | {"--stop-timeout=300"} <= set(started.split())


@pytest.fixture
def container(capsys, tmp_path):
    """Makes the container's process, in a group of its own as under tini, with a stand-in for mlpmem."""
    _, script = printed(capsys, "--accelerator=v5e-16", "--image=I", "--stage=train")
    words = shlex.split(script.partition("docker run")[2])
    tini = words.index("--entrypoint=tini")
    assert words[tini + 1 : tini + 4] == ["I", "-g", "--"]

    def make(body: str) -> subprocess.Popen:
        (tmp_path / "mlpmem").write_text(f'#!/bin/sh\necho "$@"\n{body}\n')
        (tmp_path / "mlpmem").chmod(0o755)
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(words[tini + 4 :], env=environment, start_new_session=True, **pipes)

    return make


@pytest.mark.parametrize(("code", "of_container"), [(0, 0), (1, 1), (75, 75), (137, 137), (2, 0)])
def test_user_errors_are_not_restarted(container, code, of_container):
    process = container(f"exit {code}")
    output, errors = process.communicate()
    assert (process.returncode, output) == (of_container, "train --config=/etc/mlpmem/config.py\n")
    assert errors == ("exit code 2, a user error: not restarted\n" if code == 2 else "")


def test_mlpmem_ends_by_itself_after_sigterm(container):
    """The shell waits for it."""
    process = container("trap 'echo checkpoint; exit 75' TERM; echo started; while :; do sleep 0.01; done")
    for line in process.stdout:
        if line == "started\n":
            os.killpg(process.pid, signal.SIGTERM)
            break
    output, _ = process.communicate()
    assert (process.returncode, output) == (75, "checkpoint\n")


def test_variables_reach_the_container_as_they_are(capsys):
    _, script = printed(capsys, "--accelerator=v5e-16", "--image=I", "--env=XLA_FLAGS=--a=1 --b='$HOME'", "--env=A=")
    words = shlex.split(script.partition("docker run")[2])
    assert {"--env=XLA_FLAGS=--a=1 --b='$HOME'", "--env=A=", "--env=JAX_PLATFORMS=tpu,cpu"} <= set(words)


def test_without_restarts_docker_does_not_restart(capsys):
    _, script = printed(capsys, "--accelerator=v5e-16", "--image=I", "--max_restarts=0")
    assert "--restart=no " in script
    assert "configure-docker" not in script


def test_without_dry_run_the_script_goes_to_gcloud(capsys, tmp_path, stand_in):
    stand_in("gcloud", code=4)
    arguments = ["--accelerator=v5e-16", "--image=I"]
    command, script = printed(capsys, *arguments)
    with pytest.raises(SystemExit, match="4"):
        tpu_vm.main([*BASE, *arguments])
    assert (tmp_path / "gcloud.words").read_text().split() == command[1:]
    assert (tmp_path / "gcloud.sent").read_text() == script
