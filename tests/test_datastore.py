"""The stage `datastore`: what a pass computes, what is counted, and what is refused."""

import contextlib
import itertools
import pathlib
import shutil

import jax
import numpy as np
import pytest
from test_pipeline import small

from mlpmem_jax import stages
from mlpmem_jax.core.artifacts import ArtifactWriter
from mlpmem_jax.core.errors import UserError
from mlpmem_jax.models import gpt2, saved
from mlpmem_jax.retrieval import datastore


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = small(tmp_path_factory.mktemp("datastore") / "run")
    docs = pathlib.Path(__file__).parent.parent / "docs"
    config.corpus.update({"source": "files", "path": str(docs), "document_bytes": 2048})
    config.datastore.batch_sequences = 16
    stages.run("tokens", config)
    model = gpt2.GPT2Config(vocab_size=300, context_length=16, width=16, blocks=3, heads=2)
    writer = ArtifactWriter.create(f"{config.workdir}/base", "base", {}, {}, {})
    saved.seal(writer, model, gpt2.init(model, jax.random.key(0)), {})
    return config.lock()


def test_passes_are_few_of_one_size_and_nearly_full():
    for count, devices, parts in itertools.product(range(1, 70), (1, 2, 8), (1, 2, 4)):
        largest = devices * parts
        rows = datastore.rows_of_pass(count, largest, devices)
        passes = -(-count // rows)
        assert rows % devices == 0
        assert rows <= largest
        assert passes <= -(-count // largest)
        assert passes * rows - count < passes * devices, "more padding than the devices ask for"


def test_progress_counts_every_position_once_and_comes_with_every_pass(config, monkeypatch):
    told = {}

    class Bar:
        def __init__(self, name):
            self.steps = told.setdefault(name, [])

        def advance(self, amount):
            self.steps.append(amount)

    totals = {}

    @contextlib.contextmanager
    def progress(total, description, unit):
        totals[description] = total
        yield Bar(description)

    monkeypatch.setattr(datastore, "progress", progress)
    artifacts = datastore.run(config)
    for split, artifact in artifacts.items():
        positions, name = np.prod(artifact.arrays["next_tokens"].shape), f"datastore/{split}"
        assert totals[name] == sum(told[name]) == positions
        assert max(told[name]) <= config.datastore.batch_sequences * config.base.context_length
        assert artifact.summary["positions"] == positions
        assert artifact.summary["input_block"] == 2  # depth 0.7 of three blocks


@pytest.mark.parametrize(
    ("block", "value", "expected"),
    [
        (1, 1e6, r"datastore/train, shard 0: memory_inputs .*float16 overflows beyond 65,504.*dtype to bfloat16"),
        (2, np.nan, r"datastore/train, shard 0: keys .*forward pass ran in float32.*parameters"),
    ],
)
def test_numbers_that_are_not_finite_are_refused(config, monkeypatch, block, value, expected):
    load = saved.load_language_model

    def spoiled(*arguments):
        parameters, *rest = load(*arguments)
        scale = parameters["h"]["ln_2"]["scale"]
        parameters["h"]["ln_2"]["scale"] = scale.at[block].multiply(value)
        return parameters, *rest

    monkeypatch.setattr(saved, "load_language_model", spoiled)
    shutil.rmtree(f"{config.workdir}/datastore", ignore_errors=True)
    with pytest.raises(UserError, match=expected):
        datastore.run(config)


def test_bfloat16_passes_say_which_dtype_to_take(config):
    arrays = {"base_log_probabilities": np.array([-1.0, np.nan], np.float32)}
    settings = config.datastore.copy_and_resolve_references()
    with settings.unlocked():
        settings.compute_dtype = "bfloat16"
    with pytest.raises(UserError, match=r"base_log_probabilities .*bfloat16.*compute_dtype to float32"):
        datastore._check_finite(arrays, "datastore/test, shard 0", settings)


def test_a_base_that_is_worse_than_guessing_is_reported(config, monkeypatch):
    said, load = [], saved.load_language_model

    def overconfident(*arguments):
        parameters, *rest = load(*arguments)
        parameters["ln_f"] = jax.tree.map(lambda array: 100 * array, parameters["ln_f"])
        return parameters, *rest

    monkeypatch.setattr(saved, "load_language_model", overconfident)  # random, and sure of it
    monkeypatch.setattr(datastore, "say", said.append)
    shutil.rmtree(f"{config.workdir}/datastore", ignore_errors=True)
    artifact = datastore.run(config)["test"]
    assert sum("the base's loss on the test split" in line for line in said) == 1
    said.clear()
    datastore._note_bad_base(artifact, 1, 10**300, "test")  # better than guessing among so many tokens
    assert not said
