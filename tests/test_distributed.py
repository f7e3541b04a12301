"""Joining a job, and telling a lost process from other failures."""

import os
import subprocess
import sys

import jax
import pytest

from mlpmem_jax.core import distributed
from mlpmem_jax.core.errors import UserError


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MLPMEM_LOST_SECONDS": "abc"}, "MLPMEM_LOST_SECONDS: expected a whole number, found 'abc'"),
        ({"MLPMEM_DISTRIBUTED": "1"}, "this process cannot join a job of several: .*unset MLPMEM_DISTRIBUTED"),
    ],
)
def test_what_the_environment_says_of_the_job_is_one_clear_error(monkeypatch, variables, message):
    for name, value in {"grpc_proxy": "", **variables}.items():  # joining sets the first, for good
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed.jax.distributed, "initialize", _no_cluster)
    with pytest.raises(UserError, match=message):
        distributed.join_job()


def _no_cluster(**_):
    raise ValueError("coordinator_address should be defined.")


def test_an_accelerator_that_is_not_here_is_one_clear_error():
    code = (
        "from mlpmem_jax.core import distributed, failures\n"
        "with failures.reported('x'), distributed.job('/nowhere'): pass"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "JAX_PLATFORMS": "cuda", "JAX_COMPILATION_CACHE_DIR": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("x: error: the environment variable JAX_PLATFORMS=cuda: JAX finds no such accelerator here")
    assert "Traceback" not in done.stderr


def test_a_slice_of_several_hosts_is_refused_by_a_process_that_has_joined_no_job(monkeypatch, tmp_path):
    with distributed.job(str(tmp_path)):
        pass
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 16)
    message = r"of 16 hosts, .* launch.jobset or launch.tpu_vm .* MLPMEM_DISTRIBUTED=1"
    with pytest.raises(UserError, match=message), distributed.job(str(tmp_path)):
        pytest.fail("it went on")


def raised_from(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("FAILED_PRECONDITION: Gloo AllReduce failed: Connection closed by peer [::1]:4"),
        jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out. Id: [tokens::1]."),
        raised_from(RuntimeError("the save failed"), jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect")),
    ],
)
def test_a_lost_process_is_recognized(error):
    assert distributed.sign_of_loss(error) is not None


@pytest.mark.parametrize(
    "error",
    [
        ValueError("UNAVAILABLE: Error writing 'gs://bucket/run/tokens': HTTP response code: 503"),
        OSError("DEADLINE_EXCEEDED while reading gs://bucket"),
        jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes do not match"),
    ],
)
def test_neither_a_bucket_that_is_unavailable_nor_a_bug_is_a_lost_process(error):
    assert distributed.sign_of_loss(error) is None
