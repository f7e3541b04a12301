"""Profiles: the trace is read back by JAX's own reader; what is traced changes no result."""

import multiprocessing
import pathlib
import re

import jax
import numpy as np
import pytest
import test_training_loop as training

from configs import default
from mlpmem_jax.core import chips, device_rates
from mlpmem_jax.core.config import check_config
from mlpmem_jax.core.errors import ConfigError
from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.training import loop


def fit(folder, source=None, **changes):
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    task = training.task(steps=6, warmup_steps=1, optimizer="adamw", **changes)
    return training.fit(folder, mesh, task=task, source=source)[0]


def succeeds_in_a_process_of_its_own(check, folder):
    """Where the compiler for TPUs was loaded, as other tests do, JAX's profiler would call it and crash."""
    process = multiprocessing.get_context("spawn").Process(target=check, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == 0


def holds_the_steps_and_the_scopes(folder: pathlib.Path):
    plain, traced = fit(folder / "plain"), fit(folder / "traced", profile_steps="3:4")
    jax.tree.map(np.testing.assert_array_equal, plain, traced)

    assert not list((folder / "plain").rglob("*.xplane.pb"))
    (file,) = (folder / "traced" / "tensorboard" / "plugins" / "profile").glob("*/*.xplane.pb")
    events = [event for plane in jax.profiler.ProfileData.from_file(str(file)).planes for line in plane.lines
              for event in line.events]  # fmt: skip
    steps = sorted(dict(event.stats)["step_num"] for event in events if event.name == "train")
    assert steps == [3, 4]
    assert sum(event.name == "input pipeline" for event in events) == 2
    programs = file.read_bytes()  # beside the events, the compiled programs with the scope of each operation
    for scope in ("input", "blocks", "loss", "optimizer"):
        assert re.search(rf"[/(]{scope}[/)]".encode(), programs), scope


def test_a_trace_holds_the_steps_and_the_scopes(tmp_path):
    succeeds_in_a_process_of_its_own(holds_the_steps_and_the_scopes, tmp_path)


def ends_its_trace_when_it_fails(folder: pathlib.Path):
    class Broken(training.Source):
        def __getitem__(self, index):
            raise RuntimeError("unreadable")

    with pytest.raises(RuntimeError, match="unreadable"):
        fit(folder, profile_steps="1:2", source=Broken())
    with jax.profiler.trace(folder):  # refused while another trace runs
        pass


def test_a_run_that_fails_ends_its_trace(tmp_path):
    succeeds_in_a_process_of_its_own(ends_its_trace_when_it_fails, tmp_path)


@pytest.mark.parametrize("text", ["1", "0:2", "3:2", "-1:2", "a:b", "1:2:3"])
def test_steps_that_are_none_are_refused(text):
    config = default.get_config()
    config.training.profile_steps = text
    with pytest.raises(ConfigError, match=r"config\.training\.profile_steps: expected two steps 'A:B'"):
        check_config(config)


def test_steps_beyond_the_run_are_refused(tmp_path):
    config = default.get_config()
    config.base.training.update({"steps": 100, "profile_steps": "99:101"})
    with pytest.raises(ConfigError, match=r"config\.base\.training\.profile_steps: '99:101' ends after .* 100"):
        check_config(config)
    with pytest.raises(ConfigError, match=r"profile_steps: '5:7' ends after .* 6"):  # where epochs decide
        fit(tmp_path, profile_steps="5:7")


def test_a_profile_is_no_part_of_the_origin():
    settings = default.optimization()
    before = loop.origin(settings)
    settings.profile_steps = "3:4"
    assert loop.origin(settings) == before


def test_utilization_is_of_the_published_peak_where_there_is_one(monkeypatch):
    monkeypatch.setattr(device_rates, "matmul_rate", lambda dtype: 2e11)
    assert device_rates.peak_rate("float32") == 2e11
    monkeypatch.setattr(jax, "devices", lambda: [type("Device", (), {"device_kind": "NVIDIA H100 80GB HBM3"})])
    assert device_rates.peak_rate("bfloat16") == pytest.approx(989e12, rel=1e-3)
    assert chips.published("TPU v5 lite").flops == chips.CHIPS["v5e"].flops
