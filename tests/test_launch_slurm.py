"""The batch script, run with stand-ins for srun and scontrol."""

import pathlib
import subprocess

import pytest

from launch import slurm
from mlpmem_jax.core import config_files

ROOT = pathlib.Path(__file__).parents[1]
BASE = ["--nodes=2", "--gpus_per_node=8", "--time=12:00:00", f"--config={ROOT}/configs/default.py"]


@pytest.fixture(autouse=True)
def no_real_commands(tmp_path, monkeypatch):
    """A test that fails must not reach a real sbatch of the machine it runs on."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


def printed(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as end:
        slurm.main([*BASE, *arguments, "--dry_run"])
    output = capsys.readouterr()
    assert end.value.code == 0, output.err
    return output.out


def test_one_process_for_each_gpu_that_sees_all_of_its_node(capsys):
    script = printed(capsys, "--partition=a100", "--account=lab", "--name=memory")
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash"
    directives = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert directives >= {
        *("--job-name=memory", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=12:00:00"),
        *("--partition=a100", "--account=lab", "--requeue", "--signal=TERM@300", "--open-mode=append"),
        *("--cpus-per-task=8", "--mem=0"),
    }
    assert "gpus-per-task" not in script
    assert "export MLPMEM_DISTRIBUTED=1" in lines
    assert "export JAX_PLATFORMS=cuda" in lines


@pytest.mark.parametrize(
    ("codes", "restarts", "status", "requeued"),
    [
        ((0, 0), None, 0, False),
        ((0, 1), None, 1, True),
        ((137, 75), "2", 137, True),
        ((1, 1), "3", 1, False),
        ((2, 2), None, 2, False),
        ((137, 2), None, 2, False),  # the first process lingers after a user error, and srun kills it meanwhile
    ],
)
def test_failures_are_requeued_until_the_limit_but_user_errors_are_not(
    capsys, tmp_path, codes, restarts, status, requeued
):
    script = printed(capsys, "--max_restarts=3", f"--venv={tmp_path}", "--cpus_per_gpu=3", "--config.workdir=/a b")
    words = 'printf "%s\\n" "$@" >'
    executables = {
        # Runs the command as two processes, and ends with the highest of their exit codes, as srun does.
        "srun": f"{words} {tmp_path}/options; while [ $1 != bash ]; do shift; done; highest=0; for rank in 0 1; do "
        'RANK=$rank "$@"; code=$?; [ $code -gt $highest ] && highest=$code; done; exit $highest',
        "scontrol": f"{words} {tmp_path}/scontrol.words",
        "bin/mlpmem": f"{words} {tmp_path}/words; [ $RANK = 0 ] && exit {codes[0]}; exit {codes[1]}",
    }
    (tmp_path / "bin").mkdir()
    for name, body in executables.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "17"}
    if restarts:
        environment["SLURM_RESTART_COUNT"] = restarts
    done = subprocess.run(["/bin/bash"], input=script, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == status
    assert not list(tmp_path.glob("*.user_error"))
    assert "--cpus-per-task=3" in (tmp_path / "options").read_text().splitlines()
    config = tmp_path / "mlpmem-17.config.py"  # whatever became of the file that was submitted
    assert (tmp_path / "words").read_text().splitlines() == ["run", f"--config={config}"]
    given = [f"{ROOT}/configs/default.py", ["--config.workdir=/a b"]]
    assert config_files.read(str(config), []) == config_files.read(*given)
    assert (tmp_path / "scontrol.words").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol.words").read_text().split() == ["requeue", "17"]


def test_without_dry_run_the_script_goes_to_sbatch(capsys, monkeypatch, tmp_path):
    script = printed(capsys)
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\n/bin/cat > {tmp_path}/sent\nexit 5\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="5"):
        slurm.main(BASE)
    assert (tmp_path / "sent").read_text() == script


def test_impossible_sizes_are_refused(capsys):
    for wrong, message in (("--nodes=0", "--nodes=0: expected 1 or more"), ("--gpus_per_node=3", "config.datastore")):
        with pytest.raises(SystemExit, match="2"):
            slurm.main([*BASE, wrong, "--dry_run"])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["--name=-x", "--partition=a b", "--account=", "--time=1:00\ntrue"])
def test_words_that_would_not_stay_words_are_refused(capsys, wrong):
    with pytest.raises(SystemExit, match="2"):
        slurm.main([*BASE, wrong, "--dry_run"])
    assert f"error: {wrong}: expected" in capsys.readouterr().err
