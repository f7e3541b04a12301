"""Parameters and checkpoints are read back as they were written, whatever the folder is called."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlpmem_jax.core import parameters as stored
from mlpmem_jax.core.artifacts import ArtifactWriter
from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.core.sharding import Sharding


@pytest.mark.parametrize("name", ["plain", "x[y]", "a*b?", "with space", "ünïcode", "#%;=", "[!a]"])
def test_any_legal_name_works(tmp_path, name):
    mesh = make_mesh(1, -1, 1)
    placed = Sharding(mesh).named("embed", None)
    parameters = {"kernel": jax.device_put(jnp.arange(48.0).reshape(16, 3), placed)}
    writer = ArtifactWriter.create(tmp_path / name / "base", "base", {}, {}, {})
    stored.write(writer.path, parameters)
    artifact = writer.seal({"parameters_fingerprint": stored.fingerprint(parameters)})
    abstract = jax.eval_shape(lambda: parameters)
    actual = stored.read(artifact, abstract, {"kernel": placed})
    np.testing.assert_array_equal(actual["kernel"], np.arange(48.0).reshape(16, 3))
