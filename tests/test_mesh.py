"""Mesh and sharding rules."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mlpmem_jax.core.errors import ConfigError
from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.core.sharding import Sharding, local_rows


def test_sizes_fill_the_devices():
    assert dict(make_mesh(1, -1, 2).shape) == {"slice": 1, "fsdp": 4, "tensor": 2}
    assert dict(make_mesh(2, 2, 2).shape) == {"slice": 2, "fsdp": 2, "tensor": 2}
    assert Sharding(make_mesh(2, 2, 2)).shards("batch") == 4


@pytest.mark.parametrize("sizes", [(1, 3, 1), (1, -1, -1), (3, -1, 1), (1, 2, 2)])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ConfigError, match=r"config.mesh"):
        make_mesh(*sizes)


def test_logical_axes_follow_the_table():
    assert Sharding(None).spec("layers", "embed", "mlp") == PartitionSpec(None, "fsdp", "tensor")
    assert Sharding(None).spec("batch", None) == PartitionSpec(("slice", "fsdp"), None)
    with pytest.raises(ConfigError, match="no rule for the logical axes"):
        Sharding(None).spec("heads", "rank")


def test_global_batches_come_back_in_order():
    mesh = make_mesh(2, 2, 2)
    rows = np.arange(24.0).reshape(8, 3)
    placed = Sharding(mesh).global_batch({"x": rows})["x"]
    assert placed.sharding.spec == PartitionSpec(("slice", "fsdp"), None)
    np.testing.assert_array_equal(local_rows(placed), rows)
    assert isinstance(placed, jax.Array)
