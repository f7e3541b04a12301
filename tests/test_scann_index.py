import subprocess
import sys
import textwrap

import numpy as np
import pytest
from retrieval_data import WIDTH, mixture

from mlpmem_jax.retrieval import scann_backend, scann_index
from mlpmem_jax.retrieval.scann_index import Options

pytestmark = pytest.mark.skipif(bool(scann_backend.unavailable()), reason="ScaNN has no wheel for this machine")


@pytest.fixture(scope="module")
def keys():
    return mixture(np.random.default_rng(0), 6000, clusters=60).astype(np.float32)


def test_every_key_gets_the_cluster_and_the_hash_that_scann_would_give(keys, tmp_path):
    options = Options.derive(len(keys), 20, training_sample=len(keys))
    scann_index._train(keys, options, tmp_path)
    names = ("dataset.npy", "datapoint_to_token.npy", "hashed_dataset.npy")
    own = {name: np.load(tmp_path / name) for name in names}
    other = tmp_path / "filled"
    other.mkdir()
    scann_index.write(other, *keys.shape, lambda start, stop: keys[start:stop], options)
    filled = {name: np.load(other / name) for name in names}
    assert all(own[name].dtype == filled[name].dtype for name in names)
    assert len(np.unique(own["datapoint_to_token.npy"])) > 50
    assert (own["datapoint_to_token.npy"] == filled["datapoint_to_token.npy"]).mean() > 0.999  # but for roundings
    np.testing.assert_array_equal(own["dataset.npy"], filled["dataset.npy"])
    np.testing.assert_array_equal(own["hashed_dataset.npy"], filled["hashed_dataset.npy"])


def test_two_builds_in_two_processes_are_the_same_bytes(tmp_path):
    program = f"""
        import hashlib, pathlib, sys, tempfile
        import numpy as np
        from mlpmem_jax.retrieval import scann_index
        from mlpmem_jax.retrieval.scann_backend import ScannIndex
        from mlpmem_jax.retrieval.scann_index import Options
        # Keys on a coarse grid are often as near to two clusters: threads that race settle them differently.
        keys = np.round(4 * np.random.default_rng(0).normal(size=(100_000, {WIDTH}))).astype(np.float32)
        options = Options.derive(len(keys), 20, leaves=1000, training_sample=10_000)
        digest = hashlib.sha256()
        with tempfile.TemporaryDirectory() as folder:
            scann_index.write(folder, *keys.shape, lambda start, stop: keys[start:stop], options)
            for array in ScannIndex.load(folder, len(keys), options).search(keys[:300], 20):
                digest.update(array.tobytes())
            for file in sorted(pathlib.Path(folder).iterdir()):
                digest.update(file.read_bytes())
        print(digest.hexdigest())
    """
    outputs = [
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, check=True, text=True
        ).stdout
        for _ in range(2)
    ]
    assert outputs[0] == outputs[1]
