"""What the stage says it needs, and what it does where a host has less."""

import shutil
import types

import pytest
from etils import epath
from retrieval_data import config_for, write_workdir

from mlpmem_jax.core import runtime
from mlpmem_jax.core.errors import ConfigError
from mlpmem_jax.retrieval import needs, targets

GIB = 2**30
NEEDS = needs.ProcessNeeds(fixed=1 * GIB, shard=4 * GIB, disk=3 * GIB)


def test_too_many_keys_for_the_memory_are_refused(monkeypatch):
    monkeypatch.setattr(runtime, "memory_bytes", lambda: 3 * GIB)
    with pytest.raises(ConfigError, match=r"a shard of 1,000 keys takes 5\.0 GiB .* lower it to 500 or"):
        needs.check(NEEDS, 1000, epath.Path("runs"))
    monkeypatch.setattr(runtime, "memory_bytes", lambda: GIB // 2)
    with pytest.raises(ConfigError, match=r"this machine has 0\.5 GiB; use a machine with more"):
        needs.check(NEEDS, 1000, epath.Path("runs"))


def test_processes_of_a_host_share_its_memory(monkeypatch):
    monkeypatch.setattr(runtime, "memory_bytes", lambda: 16 * GIB)
    needs.check(NEEDS, 1000, epath.Path("runs"))
    monkeypatch.setattr(needs, "processes_of_host", lambda: 4)
    with pytest.raises(ConfigError, match=r"in each of 4 processes of this host, .* lower it to 750"):
        needs.check(NEEDS, 1000, epath.Path("runs"))


def test_indices_of_a_bucket_need_room_for_temporary_files(monkeypatch):
    monkeypatch.setattr(runtime, "memory_bytes", lambda: 16 * GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=2 * GIB))
    needs.check(NEEDS, 900, epath.Path("runs"))  # local: the index stays where it is built
    with pytest.raises(ConfigError, match=r"takes 3\.0 GiB of temporary files .* lower it to 600 or"):
        needs.check(NEEDS, 900, epath.Path("gs://bucket/runs"))


def test_the_stage_refuses_before_it_writes(tmp_path, monkeypatch):
    write_workdir(tmp_path)
    monkeypatch.setattr(runtime, "memory_bytes", lambda: 30_000)
    with pytest.raises(ConfigError, match="a shard of 640 keys takes"):
        targets.run(config_for(tmp_path, backend="exact", search_dimensions=4, key_shard_rows=10**6))
    assert not (tmp_path / "targets").exists()
