"""The recipes of docs/extending.md, followed: the code on the page is what runs here."""

import json
import pathlib
import re
import sys
import types

import jax
import ml_collections
import numpy as np
import pytest

from configs import default
from mlpmem_jax.comparison import tasks
from mlpmem_jax.comparison.question import Answer
from mlpmem_jax.core.config import OPTIMIZERS, SEARCH_BACKENDS
from mlpmem_jax.models import language_model, llama
from mlpmem_jax.models.config_json import ConfigJson
from mlpmem_jax.retrieval import backends, neighbors
from mlpmem_jax.training import optimizer

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "extending.md"
RECIPES = {
    file: code for code, file in re.findall(r"```(?:python|toml)\n(# (\S+)\n.*?)```", PAGE.read_text(), flags=re.S)
}


def module(file, name=None):
    namespace = types.ModuleType(name or file.removesuffix(".py").replace("/", "."))
    sys.modules[namespace.__name__] = namespace  # dataclasses look their module up
    exec(compile(RECIPES[file], file, "exec"), namespace.__dict__)
    return namespace


@pytest.fixture(autouse=True)
def no_module_stays():
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[-1] in ("capitals", "numpy_backend", "plain", "parallel_ssh", "recipe"):
            del sys.modules[name]


def test_tasks(tmp_path, monkeypatch):
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name in ("weather.toml", "capitals.py"):
        (folder / name).write_text(RECIPES[f"mlpmem_jax/comparison/tasks/{name}"])
    for name, rows in (
        ("weather", [{"report": "High pressure.", "sky": "clear"}, {"report": "A front.", "sky": "rain"}]),
        ("capitals", [{"question": "Capital of Peru?", "answers": ["Lima"]}]),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(tasks, "_FOLDER", folder)
    monkeypatch.setattr(tasks, "__path__", [str(folder), *tasks.__path__])
    assert tasks.names() == ["capitals", "weather"]
    weather = tasks.find("weather").load(tmp_path)["test"]
    assert [question.gold for question in weather] == [0, 1]
    assert tasks.find("weather").prompt(weather[0]) == "High pressure. Tomorrow will be"
    capitals = tasks.find("capitals")
    (question,) = capitals.load(tmp_path)["test"]
    measured = capitals.measure(question, Answer(np.array([-1.5]), text="Lima."))
    assert measured == {"gold log-probability": -1.5, "exact match": 1.0, "token match": 1.0}


def test_a_search_backend(monkeypatch, tmp_path):
    module("mlpmem_jax/retrieval/numpy_backend.py")
    monkeypatch.setitem(SEARCH_BACKENDS, "numpy", "mlpmem_jax.retrieval.numpy_backend")
    name, backend = backends.chosen("numpy")
    keys = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    source = backends.KeySource(20, 4, np.dtype(np.float32), lambda start, stop: keys[start:stop])
    index = backend.create({}, 3).open(source, tmp_path)
    distances, ids = index.search(keys[:2], 3, np.array([[0, 1], [1, 20]]))
    assert name == "numpy"
    assert 0 not in ids[0]
    assert list(ids[1]) == [0, neighbors.MISSING, neighbors.MISSING]
    np.testing.assert_allclose(distances[0], np.sort(((keys[1:] - keys[0]) ** 2).sum(1))[:3], rtol=1e-6)


def test_an_optimizer(monkeypatch):
    recipe = module("mlpmem_jax/training/optimizer.py", "recipe")
    monkeypatch.setitem(optimizer.OPTIMIZERS, "lion", recipe._lion)
    settings = ml_collections.ConfigDict(default.optimization())
    settings.update({"optimizer": "lion", "warmup_steps": 0, "learning_rate": 0.1})
    lion = optimizer.make_optimizer(settings, 10, {"w": (None,)})
    updates, _ = lion.update({"w": np.array([3.0, -2.0])}, lion.init({"w": np.zeros(2)}), {"w": np.zeros(2)})
    np.testing.assert_allclose(updates["w"], [-0.1, 0.1], rtol=1e-5)
    assert set(OPTIMIZERS) == set(optimizer.OPTIMIZERS) - {"lion"}


def test_a_model_family(monkeypatch):
    plain = module("mlpmem_jax/models/plain.py")
    monkeypatch.setattr(language_model, "FAMILIES", (plain, *language_model.FAMILIES))
    monkeypatch.setitem(language_model._BY_NAME, "plain", plain)
    config = plain.Config(40, 16, 12, 2, 4, 2, 6, 20)
    parameters = language_model.init(config, jax.random.key(0))
    tokens = np.arange(8)[None]
    plain_llama = llama.LlamaConfig(40, 16, 12, 2, 4, 2, 6, 20)
    ours, theirs = (language_model.logits(parameters, model, tokens) for model in (config, plain_llama))
    assert language_model.family(config) == "plain"
    assert language_model.from_json(ConfigJson("config.json", language_model.to_json(config))) == config
    np.testing.assert_allclose(ours[0, 0], theirs[0, 0], rtol=1e-5)  # the first position is turned by nothing
    assert float(np.abs(ours[0, 7] - theirs[0, 7]).max()) > 1e-6
    assert language_model.parameter_count(config) == sum(array.size for array in jax.tree.leaves(parameters))
    _, block_inputs = language_model.features(parameters, config, tokens, input_blocks=(1, 2))
    assert set(block_inputs) == {1, 2}


def test_a_launcher(capsys):
    parallel_ssh = module("launch/parallel_ssh.py")
    words = ["--hosts=a,b", "--config=configs/smoke.py", "--config.workdir=/shared/run", "--dry_run"]
    with pytest.raises(SystemExit, match="0"):
        parallel_ssh.main(words)
    assert "MLPMEM_DISTRIBUTED=1 mlpmem run --config=configs/smoke.py" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        parallel_ssh.main([*words, "--hosts=a,b,c"])  # three do not divide the batch
