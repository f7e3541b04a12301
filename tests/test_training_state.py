"""Checkpoints: what was saved comes back, and what was damaged is named in one line."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlpmem_jax.core.errors import ArtifactError
from mlpmem_jax.training.state import Checkpoints


def state_of(seed):
    random = np.random.default_rng(seed)
    kernel = jnp.asarray(random.normal(size=(24, 40)), jnp.float32)
    return {"parameters": {"kernel": kernel}, "optimizer": {"mu": 2 * kernel}, "step": jnp.asarray(seed, jnp.int32)}


def saved(folder):
    checkpoints = Checkpoints(folder)
    checkpoints.save(7, state_of(7), 112, {"perplexity": 3.0})
    checkpoints.close()
    return sorted(file for file in (folder / "checkpoints").rglob("*") if file.is_file() and file.stat().st_size)


def restored(folder):
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.restore(checkpoints.latest_step(), jax.eval_shape(lambda: state_of(7)))
    finally:
        checkpoints.close()


def test_a_flipped_bit_is_found_or_does_no_harm(tmp_path):
    files, told = saved(tmp_path), []
    assert len(files) > 5
    expected, random = restored(tmp_path), np.random.default_rng(3)
    assert expected[1] == 112
    for file in files:
        content = file.read_bytes()
        for place in random.integers(len(content), size=2):
            flipped = bytearray(content)
            flipped[place] ^= 1 << random.integers(8)
            file.write_bytes(flipped)
            try:
                actual = restored(tmp_path)
            except ArtifactError as error:
                told.append(str(error))
            else:
                jax.tree.map(np.testing.assert_array_equal, actual, expected)
        file.write_bytes(content)
    assert len(told) > 3
    for text in told:
        assert re.fullmatch(rf"{tmp_path}/checkpoints[^\n]*; delete [^\n]*", text)


def test_numbers_that_were_exchanged_are_found(tmp_path, monkeypatch):
    """Also where every file can be read, as after a write that a disk lost."""
    saved(tmp_path / "one")
    checkpoints = Checkpoints(tmp_path / "other")
    checkpoints.save(7, state_of(8), 112, {"perplexity": 3.0})
    checkpoints.close()
    (tmp_path / "one/checkpoints/7/data").rename(tmp_path / "data")
    (tmp_path / "other/checkpoints/7/data").rename(tmp_path / "one/checkpoints/7/data")
    with pytest.raises(ArtifactError, match=r"checkpoints/7: the state differs from the one that was saved; delete "):
        restored(tmp_path / "one")


@pytest.mark.parametrize(
    ("item", "file", "old", "new"),
    [("metrics", "metrics", '"perplexity": 3.0', '"perplexity": 2.0'), ("data", "metadata", ": 112,", ": 113,")],
)
def test_a_figure_that_was_changed_is_told(tmp_path, item, file, old, new):
    saved(tmp_path)
    path = tmp_path / "checkpoints/7" / item / file
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    checkpoints = Checkpoints(tmp_path)
    reads = {
        "metrics": checkpoints.best_step,
        "data": lambda: checkpoints.restore(7, jax.eval_shape(lambda: state_of(7))),
    }
    with pytest.raises(ArtifactError, match=r"saved; delete .*/7 to resume"):
        reads[item]()
    checkpoints.close()
