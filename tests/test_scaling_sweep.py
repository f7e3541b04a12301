"""Sweeps before and around their compute: what is checked, what is shared, what a budget buys, how tasks are run."""

import errno
import json
import pathlib
import signal
import subprocess
import sys
import time

import ml_collections
import pytest

from configs import quickstart, smoke
from configs.sweeps import point
from mlpmem_jax.core.errors import ConfigError, Stopped, UserError
from mlpmem_jax.models import flops, language_model
from mlpmem_jax.models.gpt2 import GPT2Config
from mlpmem_jax.scaling import budgets, launching, runner, sweep, tasks
from mlpmem_jax.scaling.tasks import SweepTask

FILES = sorted((pathlib.Path(__file__).parents[1] / "configs" / "sweeps").glob("*_*.py"))
READY = [file for file in FILES if file.stem not in ("__init__", "gpt2_sizes")]


def file_of(folder, points="[]", positions=0, counted="training", workdir="runs/x"):
    """A sweep file whose points are this text."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "toy.py"
    text = f"""\
from configs import quickstart
from configs.sweeps import point

def get_sweep():
    config = quickstart.get_config()
    config.workdir = {str(workdir)!r}
    points = {points}
    return {{"config": config, "counted": {counted!r}, "positions": {positions}, "points": points}}
"""
    file.write_text(text)
    return str(file)


SIZES = """[
    point(f"w{width}-{arm}", arm, 1e12, overrides={"base.width": width, "memory.width": width})
    for width in (16, 32) for arm in ("continued", "augmented")
]"""


def test_a_budget_buys_the_same_compute_in_both_arms(tmp_path):
    points = {each.name: each for each in sweep.read(file_of(tmp_path, SIZES)).points}
    # By hand, width 32: GPT-2 of 2 blocks over 128 positions, a memory of 4 blocks; 2048 tokens.
    base = 3 * (2 * 2 * 12 * 32**2 + 2 * 128 * 2 * 32 + 2 * 32 * 2048)
    memory = 3 * (4 * 4 * 32 * 4 * 32 + 2 * 32 * 2048)
    sequences = points["w32-continued"].config.training.batch_sequences
    assert points["w32-continued"].config.training.steps == round(1e12 / (base * sequences * 128))
    assert points["w32-augmented"].config.training.steps == round(1e12 / (memory * sequences * 128))
    assert points["w16-augmented"].config.training.steps > points["w32-augmented"].config.training.steps
    assert points["w16-augmented"].config.workdir.endswith("runs/x/points/w16-augmented")


def test_targets_may_be_paid_from_the_budget(tmp_path):
    plain = sweep.read(file_of(tmp_path / "a", SIZES)).points
    paying = sweep.read(file_of(tmp_path / "b", SIZES, positions=100_000, counted="training and targets")).points
    for free, charged in zip(plain, paying, strict=True):
        config = free.config
        if free.arm == "continued":
            assert charged.config.training.steps == config.training.steps
            continue
        spent = budgets.planned_construction(config, 100_000)
        per_step = 1e12 / config.training.steps  # within half a step
        expected = (1e12 - spent) / per_step
        assert charged.config.training.steps == pytest.approx(expected, abs=1)
        assert charged.config.training.steps < config.training.steps


def test_construction_counts_forward_passes_and_the_search():
    base = GPT2Config(vocab_size=100, context_length=8, width=16, blocks=2, heads=2)
    keys = GPT2Config(vocab_size=100, context_length=8, width=32, blocks=3, heads=2)
    targets = quickstart.get_config().targets.to_dict()
    cost = budgets.construction(base, None, 8, 1000, "exact", targets)
    forward = 2 * (2 * 12 * 16**2) + 2 * 8 * 2 * 16  # twice the blocks' weights, and attention
    assert cost == 1000 * forward + 2 * 16 * 1000 * 1000
    assert budgets.construction(base, None, 8, 1000, "exact", targets, queries=0) == 1000 * forward
    with_keys = budgets.construction(base, keys, 8, 1000, "exact", targets)
    assert with_keys == cost - 2 * 16 * 1000**2 + 1000 * (2 * 3 * 12 * 32**2 + 2 * 8 * 3 * 32) + 2 * 32 * 1000**2
    many = 1_000_000
    scann = budgets.construction(base, None, 8, many, "scann", targets)
    assert many * forward < scann < 0.2 * budgets.construction(base, None, 8, many, "exact", targets)


@pytest.mark.parametrize(
    ("points", "options", "message"),
    [
        ('[point("a", "augmented", 1e12), point("a", "continued", 1e12)]', {}, "two points have the name 'a'"),
        ('[point("a", "augmented", 1e3)]', {}, "point 'a': flops: a budget of 1e.03 FLOPs is too small for one step"),
        ('[point("a", "both", 1e12)]', {}, "arm: expected 'continued' or 'augmented', found 'both'"),
        ('[point("A b", "augmented", 1e12)]', {}, "point 1: name: expected lowercase"),
        ('[point("a", "augmented", 0)]', {}, "flops: expected a number above 0, found 0"),
        ('[point("a", "augmented", 1e12, overrides={"base.widht": 3})]', {}, "'a'.*no such key; did you mean"),
        ('[point("a", "augmented", 1e12, overrides={"base.width": "x"})]', {}, "point 'a'"),
        ('[point("a", "augmented", 1e12, overrides={"base.heads": 5})]', {}, "point 'a': config.base.heads: 5"),
        ("[]", {}, "expected a list of at least one point"),
        ("5", {}, "points: expected a list of at least one point, found 5"),
        ("[5]", {}, "point 1: expected the keys name, .* found 5"),
        ('[{1: 2, "name": "a"}]', {}, "point 1: expected the keys name, .* found 1, name"),
        (
            '[point("a", "augmented", 1e12)]',
            {"counted": "training and targets", "positions": 1e6},
            r"positions: expected the number of training positions.* found 1000000\.0",
        ),
        ('[point("a", "augmented", 1e12)]', {"counted": "everything"}, "counted: expected 'training' or"),
        ('[point("a", "augmented", 1e12)]', {"counted": "training and targets"}, "positions: expected the number"),
        (
            '[point("a", "augmented", 1e9)]',
            {"counted": "training and targets", "positions": 10**6},
            "go to the targets",
        ),
        (
            '[point("a", "augmented", 1e12), point("b", "augmented", 1e12, overrides={"corpus.max_bytes": 5})]',
            {},
            "config.corpus.max_bytes is 2500000 in point 'a' and 5 in point 'b'; perplexities of different corpora",
        ),
        ('[{"name": "a"}]', {}, "point 1: expected the keys name, arm, flops"),
    ],
)
def test_what_cannot_be_swept_is_one_clear_error(tmp_path, points, options, message):
    with pytest.raises(ConfigError, match=message):
        sweep.read(file_of(tmp_path, points, **options))


def test_files_that_are_no_sweep(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        sweep.read(str(tmp_path / "none.py"))
    with pytest.raises(ConfigError, match=r"has no get_sweep\(\); it is the config of one run"):
        sweep.read(smoke.__file__)
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    with pytest.raises(ConfigError, match=r"cannot be run .*nothing_of_this_name"):
        sweep.read(str(tmp_path / "broken.py"))
    with pytest.raises(ConfigError, match=r"config\.targets\.k: expected"):
        sweep.read(file_of(tmp_path, SIZES), ["--config.targets.k=0"])
    with pytest.raises(ConfigError, match=r"config\.targets\.kk: no such key"):
        sweep.read(file_of(tmp_path, SIZES), ["--config.targets.kk=0"])


@pytest.mark.parametrize("file", READY, ids=[file.stem for file in READY])
def test_ready_sweeps_spend_their_budgets(file):
    actual = sweep.read(str(file))
    for each in actual.points:
        config = each.config
        positions = config.training.steps * config.training.batch_sequences * config.base.context_length
        half_step = 0.5 / config.training.steps  # as near as whole steps come
        flops = positions * budgets.per_position(each.arm, config)
        assert flops == pytest.approx(each.flops, rel=max(0.01, half_step))
    assert actual.workdir == f"runs/{file.stem}"


def test_points_find_what_a_fine_tuned_base_was_made_from():
    """Their own stage `base` looks for it, and would import it again."""
    file = str(next(file for file in READY if file.stem == "ablation_alpha"))
    for overrides, expected in (([], False), (["--config.base.finetune_steps=10"], True)):
        actual = tasks.of_sweep(sweep.read(file, overrides))
        assert all(("pretrained" in task.links) == expected for task in actual if "base" in task.links)


def test_quickstart_sizes_are_five_over_one_and_a_half_decades():
    actual = sweep.read(str(next(file for file in READY if file.stem == "quickstart_sizes")))
    for arm in sweep.ARMS:
        of_arm = [each for each in actual.points if each.arm == arm]
        sizes = set()
        for each in of_arm:
            parameters = language_model.parameter_count(budgets.base_model(each.config))
            if arm == "augmented":
                parameters += flops.memory_parameters(budgets.memory_model(each.config))
            sizes.add(parameters)
        assert len(sizes) == 5
        assert max(sizes) / min(sizes) >= 10**1.5
        assert len({each.seed for each in of_arm}) >= 2
    budgets_by_size = {}
    for each in actual.points:
        budgets_by_size.setdefault(each.config.base.width, set()).add(each.flops)
    assert all(len(each) == 1 for each in budgets_by_size.values())


def counts(actual):
    verbs = [task.verb for task in tasks.of_sweep(actual)]
    return {verb: verbs.count(verb) for verb in dict.fromkeys(verbs)}


def test_points_share_what_they_can(tmp_path):
    assert counts(sweep.read(file_of(tmp_path, SIZES))) == {
        **dict.fromkeys(("tokens",), 1),
        **dict.fromkeys(("base", "datastore", "targets", "continued", "run"), 2),
    }
    ready = {file.stem: sweep.read(str(file)) for file in READY}
    assert counts(ready["ablation_neighbors"]) == {"tokens": 1, "base": 1, "datastore": 1, "targets": 12, "run": 12}
    assert counts(ready["ablation_alpha"]) == {"tokens": 1, "base": 1, "datastore": 1, "targets": 1, "run": 6}
    assert counts(ready["web_compute"])["targets"] == 1
    of_quickstart = counts(ready["quickstart_sizes"])
    assert of_quickstart == {"tokens": 1, "base": 5, "datastore": 5, "targets": 5, "continued": 10, "run": 10}


def test_units_come_after_what_they_need_and_link_to_it(tmp_path):
    actual = tasks.of_sweep(sweep.read(file_of(tmp_path, SIZES)))
    names = [task.name for task in actual]
    for task in actual:
        assert all(names.index(needed) < names.index(task.name) for needed in task.needs)
        places = {each.config.workdir for each in actual}
        assert all(any(target.startswith(place) for place in places) for target in task.links.values())
    longest = max(actual, key=lambda task: task.path_flops)
    assert longest.verb == "tokens"
    large = [task for task in actual if task.verb == "base" and task.config.base.width == 32]
    small = [task for task in actual if task.verb == "base" and task.config.base.width == 16]
    assert large[0].path_flops > small[0].path_flops


def test_a_damaged_report_is_not_finished(tmp_path):
    (tmp_path / "report").mkdir()
    task = SweepTask("a", "run", ml_collections.ConfigDict({"workdir": str(tmp_path)}), (), {}, 0.0)
    for content, finished in (("{", False), ("[]", False), (json.dumps({"config": {"workdir": str(tmp_path)}}), True)):
        (tmp_path / "report" / "metrics.json").write_text(content)
        assert task.is_finished() == finished


# Running: children are stand-ins that write a mark into their workdir, or fail.
CHILD = """
import pathlib, sys, time
workdir = pathlib.Path(sys.argv[2].removeprefix("--config=")).parent
name = workdir.name
with open(workdir.parents[1] / "order.txt", "a") as order:
    order.write(f"start {name}\\n")
if name == (workdir.parents[1] / "fails.txt").read_text():
    sys.exit("something of this very point is wrong")
time.sleep(0.05 if (workdir.parents[1] / "quick").exists() else 60)
(workdir / "done").write_text("")
with open(workdir.parents[1] / "order.txt", "a") as order:
    order.write(f"end {name}\\n")
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A sweep of four points whose children are stand-ins, and its workdir."""
    (tmp_path / "stand_in.py").write_text(CHILD)
    monkeypatch.setattr(runner, "PROGRAM", (sys.executable, str(tmp_path / "stand_in.py")))
    monkeypatch.setattr(SweepTask, "is_finished", lambda task: (pathlib.Path(task.config.workdir) / "done").exists())
    monkeypatch.setattr(runner.collection, "row", lambda sweep, point: {"perplexity": 20.0})
    written = []
    monkeypatch.setattr(runner.collection, "write", lambda sweep, names: written.append(set(names)) or "points.csv")
    workdir = tmp_path / "work"
    workdir.mkdir()
    (workdir / "fails.txt").write_text("")
    (workdir / "quick").write_text("")
    return sweep.read(file_of(tmp_path, SIZES, workdir=workdir)), workdir, written


def started(workdir):
    return [line.split()[1] for line in (workdir / "order.txt").read_text().splitlines() if line.startswith("start")]


def test_a_failed_point_is_named_and_does_not_stop_the_others(toy):
    actual, workdir, written = toy
    (workdir / "fails.txt").write_text("w16-augmented")
    with pytest.raises(UserError, match=r"w16-augmented: exit code 1: something of this very point is wrong") as error:
        runner.run(actual, 2)
    assert "points without a result: w16-augmented" in str(error.value)
    assert written[-1] == {"w16-continued", "w32-continued", "w32-augmented"}
    first = started(workdir)
    assert len(first) == len(set(first)) == 11
    (workdir / "fails.txt").write_text("")
    runner.run(actual, 2)
    assert started(workdir)[11:] == ["w16-augmented"]
    assert len(written[-1]) == 4


def test_what_needs_a_failed_task_is_not_started(toy):
    actual, workdir, written = toy
    base = next(task.name for task in tasks.of_sweep(actual) if task.verb == "base" and task.config.base.width == 16)
    (workdir / "fails.txt").write_text(base)
    with pytest.raises(UserError, match="points without a result: w16-continued, w16-augmented"):
        runner.run(actual, 1)
    assert written[-1] == {"w32-continued", "w32-augmented"}
    assert "w16-continued" not in started(workdir)


def test_no_more_children_than_workers_and_none_before_what_it_needs(toy):
    actual, workdir, _ = toy
    runner.run(actual, 2)
    at_once, done = set(), set()
    needs = {task.name: task.needs for task in tasks.of_sweep(actual)}
    for line in (workdir / "order.txt").read_text().splitlines():
        what, name = line.split()
        if what == "start":
            assert set(needs[name]) <= done
            at_once.add(name)
        else:
            at_once.remove(name)
            done.add(name)
        assert len(at_once) <= 2
    assert len(done) == 11


def test_a_sweep_that_is_stopped_stops_its_children(toy):
    actual, workdir, _ = toy
    (workdir / "quick").unlink()
    waiting = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, pathlib, signal, sys, time\n"
            f"while not pathlib.Path({str(workdir / 'order.txt')!r}).exists(): time.sleep(0.02)\n"
            "os.kill(os.getppid(), signal.SIGTERM)",
        ]
    )
    start = time.monotonic()
    with pytest.raises(Stopped, match="run the same command again"):
        runner.run(actual, 1)
    waiting.wait()
    assert time.monotonic() - start < 40  # its child would have slept for 60
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(("workers", "workdir", "message"), [(0, "x", "--workers=0"), (1, "gs://b/x", "--launch")])
def test_what_cannot_be_run_here(tmp_path, monkeypatch, workers, workdir, message):
    monkeypatch.setattr(SweepTask, "is_finished", lambda task: False)
    with pytest.raises(UserError, match=message):
        runner.run(sweep.read(file_of(tmp_path, SIZES, workdir=workdir)), workers)


def test_jobs_for_other_machines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    actual = sweep.read(file_of(tmp_path, SIZES, workdir=tmp_path / "work"))
    scripts = launching.write(actual, "slurm")
    assert [script.name for script in scripts] == [
        *("0-tokens.sh", "1-base.sh", "2-datastore.sh", "3-targets.sh", "4-points.sh")
    ]
    root = str(pathlib.Path(__file__).parents[1])
    options = ["--nodes=1", "--gpus_per_node=4", "--time=1:00:00", "--dry_run"]
    done = subprocess.run(
        ["sh", str(scripts[-1]), *options], capture_output=True, text=True, check=False, env={"PYTHONPATH": root}
    )
    assert done.returncode == 0, done.stderr
    jobs = [line for line in done.stdout.splitlines() if line.startswith("srun")]
    assert len(jobs) == 4
    assert sum("mlpmem continued" in job for job in jobs) == sum("mlpmem run" in job for job in jobs) == 2
    link = tmp_path / "work" / "points" / "w16-augmented" / "targets" / "train" / "link"
    target = (link.parent / link.read_text().strip()).resolve()
    assert target.parent.parent.parent == tmp_path / "work" / "shared"
    config = json.dumps((tmp_path / "runs" / "launch" / "toy" / "w16-augmented.py").read_text())
    assert str(tmp_path / "work" / "points" / "w16-augmented") in config


def test_points_are_dictionaries_with_every_key():
    assert sorted(point("a", "continued", 1.0)) == ["arm", "flops", "name", "overrides", "seed", "variant"]


def test_a_file_system_that_refuses_locks_is_no_other_sweep(tmp_path, monkeypatch):
    def refused(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(runner.fcntl, "flock", refused)
    with pytest.raises(UserError, match=r"refuses to lock files \(No locks available\)"), runner._alone(tmp_path):
        pass


def test_one_sweep_at_a_time_in_a_workdir(toy, monkeypatch):
    """Children of a killed sweep, which inherit its lock, count as one until they have ended."""
    actual, workdir, _ = toy
    (workdir / "logs").mkdir()
    with runner._alone(workdir / "logs") as lock:
        child = subprocess.Popen(["sleep", "60"], pass_fds=(lock,))
    monkeypatch.setattr(runner, "_GRACE_SECONDS", 0.3)
    with pytest.raises(UserError, match="another mlpmem sweep is running in this workdir"):
        runner.run(actual, 1)
    assert not (workdir / "order.txt").exists()
    child.kill()
    child.wait()
    runner.run(actual, 2)
    assert len(started(workdir)) == 11


def test_a_child_does_not_outlive_its_sweep(tmp_path):
    """Killed without notice, a sweep leaves no orphan that still writes."""
    child = (
        "import pathlib, time; from mlpmem_jax.core import child_process\n"
        "child_process.end_with_parent()\n"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\n"
        "time.sleep(60)"
    )
    parent = (
        "import os, subprocess, sys, time; from mlpmem_jax.core import child_process\n"
        "environment = os.environ | child_process.environment()\n"
        f"print(subprocess.Popen([sys.executable, '-c', {child!r}], env=environment).pid, flush=True)\n"
        "time.sleep(60)"
    )
    root = str(pathlib.Path(__file__).parents[1])
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, cwd=root) as running:
        pid = int(running.stdout.readline())
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        running.kill()
    end = time.monotonic() + 30
    while _is_running(pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert not _is_running(pid)


def _is_running(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
