"""Mesh and sharding rules."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mlpmem_jax.core import mesh as meshes
from mlpmem_jax.core.errors import ConfigError


def test_sizes_fill_the_devices():
    assert dict(meshes.make_mesh(1, -1, 2).shape) == {"slice": 1, "fsdp": 4, "tensor": 2}
    assert dict(meshes.make_mesh(2, 2, 2).shape) == {"slice": 2, "fsdp": 2, "tensor": 2}
    assert meshes.batch_shards(meshes.make_mesh(2, 2, 2)) == 4


@pytest.mark.parametrize("sizes", [(1, 3, 1), (1, -1, -1), (3, -1, 1), (1, 2, 2)])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ConfigError, match=r"config.mesh"):
        meshes.make_mesh(*sizes)


def test_logical_axes_follow_the_table():
    assert meshes.partition_spec(("layers", "embed", "mlp")) == PartitionSpec(None, "fsdp", "tensor")
    assert meshes.partition_spec(("batch", None)) == PartitionSpec(("slice", "fsdp"), None)
    with pytest.raises(ConfigError, match="no rule for the logical axes"):
        meshes.partition_spec(("heads", "rank"))


def test_global_batches_come_back_in_order():
    mesh = meshes.make_mesh(2, 2, 2)
    rows = np.arange(24.0).reshape(8, 3)
    placed = meshes.global_batch(mesh, {"x": rows})["x"]
    assert placed.sharding.spec == PartitionSpec(("slice", "fsdp"), None)
    np.testing.assert_array_equal(meshes.local_rows(placed), rows)
    assert isinstance(placed, jax.Array)
