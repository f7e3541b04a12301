"""`mlpmem compare` on a small run: every system against what its parts say, computed directly; work that is kept."""

import json
import pathlib
import types

import numpy as np
import pytest
import scipy.special
from comparison_data import small_run, write_data

from configs import smoke
from mlpmem_jax.comparison import (
    compare,
    costs,
    greedy,
    packing,
    reading,
    scores,
    searching,
    speed,
    systems,
    tasks,
    weights,
)
from mlpmem_jax.core.artifacts import open_artifact
from mlpmem_jax.core.errors import ConfigError, UserError
from mlpmem_jax.corpus.tokens import read_tokenizer
from mlpmem_jax.models import language_model, memory, saved


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    with small_run(tmp_path_factory.mktemp("comparison")) as config:
        yield config


@pytest.fixture(scope="module")
def compared(config):
    return compare.run(config)


@pytest.fixture(scope="module")
def answers(config, compared):
    lines = pathlib.Path(config.workdir, "comparison/answers.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def of_system(answers, task, name):
    return [line["systems"][name] | {"id": line["id"]} for line in answers if line["task"] == task]


class Direct:
    """What the parts of a run say about a text, from whole distributions and a search over all keys."""

    def __init__(self, config):
        workdir = systems.Workdir(config)
        self.tokenizer = read_tokenizer(workdir.tokens)
        self.base, self.model, _ = saved.load_language_model(f"{config.workdir}/base", workdir.sharding)
        self.memory, self.dimensions, artifact = saved.load_memory(f"{config.workdir}/memory", workdir.sharding)
        self.block = saved.input_block(artifact)
        datastore = open_artifact(f"{config.workdir}/datastore/train", "datastore")
        count = datastore.arrays["keys"].shape[0]
        self.keys_NxD = datastore.read("keys", 0, count).astype(np.float64).reshape(-1, self.model.width)
        self.next_N = datastore.read("next_tokens", 0, count).ravel()
        self.k, self.temperature = config.targets.k, config.targets.temperature

    def distributions(self, ids):
        """p of the base, the memory and kNN at the next token of every position, [T, V] each."""
        tokens = np.zeros((1, self.model.context_length), np.int32)  # one shape, one compilation
        tokens[0, : len(ids)] = ids
        base = np.asarray(language_model.logits(self.base, self.model, tokens), np.float64)[0]
        _, block_inputs = language_model.features(
            self.base, self.model, tokens, input_blocks=(self.block, self.model.blocks)
        )
        memory_logits = np.asarray(memory.logits(self.memory, self.dimensions, block_inputs[self.block]), np.float64)[0]
        knn = np.zeros_like(base)
        for position, query in enumerate(np.asarray(block_inputs[self.model.blocks], np.float64)[0][: len(ids)]):
            distances = ((self.keys_NxD - query) ** 2).sum(1)
            nearest = np.argsort(distances, kind="stable")[: self.k]
            shares = scipy.special.softmax(-distances[nearest] / self.temperature)
            np.add.at(knn[position], self.next_N[nearest], shares)
        vocabulary = self.model.vocab_size
        actual = scipy.special.softmax(base, 1), scipy.special.softmax(memory_logits, 1)[:, :vocabulary], knn
        return [values[: len(ids)] for values in actual]

    def log_probability(self, prompt, continuation, side, weight):
        first = len(self.tokenizer.encode(prompt).ids)
        ids = self.tokenizer.encode(prompt + continuation).ids
        base, *sides = self.distributions(ids[:-1])
        mixed = (1 - weight) * base + weight * (sides[side] if side is not None else base)
        return sum(np.log(mixed[place - 1, ids[place]]) for place in range(first, len(ids)))


@pytest.mark.parametrize(("name", "side"), [("base", None), ("memory", 0), ("knn_lm", 1)])
def test_gold_log_probabilities_are_those_of_the_parts(config, answers, name, side):
    direct = Direct(config)
    for line in [line for line in answers if line["task"] == "passages"][:3]:
        of = line["systems"][name]
        expected = direct.log_probability(line["prompt"], f" {line['gold'][0]}", side, of["weight"] or 0.0)
        assert of["gold log-probability"] == pytest.approx(expected, rel=2e-3)  # keys are stored in float16


@pytest.mark.parametrize(("side", "weight"), [(0, 0.5), (1, 0.6)])
def test_texts_are_the_likeliest_tokens_of_the_mixture(config, side, weight):
    direct, workdir = Direct(config), systems.Workdir(config)
    prompts = [direct.tokenizer.encode(text).ids for text in ("Aldford is a town on", "Its 7 mills", "the")]
    decoders = workdir.decoders(systems.SYSTEMS["base"], workdir.side(("memory", "knn")[side]))
    actual = greedy.generate(*decoders, weight, prompts, 5, lambda ids: False, "texts")
    for prompt, text in zip(prompts, actual, strict=True):
        ids = list(prompt)
        for token in text:
            base, *sides = direct.distributions(ids)
            mixed = (1 - weight) * base[-1] + weight * sides[side][-1]
            assert mixed[token] >= mixed.max() * (1 - 1e-3)
            ids.append(token)
        assert len(text) == 5


def test_at_lambda_0_a_system_writes_what_its_language_model_writes(answers):
    alone = {"memory": "base", "knn_lm": "base", "memory+rag": "rag", "cpt+memory": "cpt"}
    texts = [
        (of["text"], line["systems"][alone[name]]["text"])
        for line in answers
        for name, of in line["systems"].items()
        if of["weight"] == 0 and line["task"] == "passages"
    ]
    assert texts
    assert all(mixed == unmixed for mixed, unmixed in texts)


def test_every_system_answers_every_task(config, compared, answers):
    assert list(compared["tasks"]) == ["passages", "rt", "truthfulqa"]
    assert [of["questions"] for of in compared["tasks"].values()] == [6, 6, 4]
    for task in compared["tasks"].values():
        assert list(task["systems"]) == list(systems.SYSTEMS)
        for name, of in task["systems"].items():
            assert all(np.isfinite(value) for value in of["measures"].values())
            assert bool(of["weights"]) == bool(systems.SYSTEMS[name].side)
            if name != "base":
                low, high = of["over base"][task["headline"]]
                assert (
                    low
                    <= of["measures"][task["headline"]] - task["systems"]["base"]["measures"][task["headline"]]
                    <= high
                )
    base, rag = compared["tasks"]["passages"]["systems"]["base"], compared["tasks"]["passages"]["systems"]["rag"]
    assert rag["measures"]["gold log-probability"] != base["measures"]["gold log-probability"]
    page = pathlib.Path(config.workdir, "comparison/index.html").read_text()
    assert all(systems.SYSTEMS[name].title in page for name in systems.SYSTEMS)
    cost_of = compared["systems"]
    assert cost_of["base"]["training_flops"] == 0 < cost_of["lora"]["training_flops"]
    assert cost_of["memory"]["training_flops"] == pytest.approx(cost_of["cpt"]["training_flops"], rel=0.5)
    assert cost_of["knn_lm"]["bytes"] > cost_of["base"]["bytes"]
    parameters = {name: cost["parameters"] for name, cost in cost_of.items()}
    assert parameters["cpt"] == parameters["base"] == parameters["knn_lm"] < parameters["memory"]
    assert parameters["cpt+memory"] == parameters["cpt"] + parameters["memory"]  # the memory reads the base's states
    assert (
        cost_of["cpt+memory"]["bytes"] > cost_of["cpt"]["bytes"] + cost_of["memory"]["bytes"] - cost_of["rag"]["bytes"]
    )
    datastore = open_artifact(f"{config.workdir}/datastore/train", "datastore")
    base = saved.language_model_config(open_artifact(f"{config.workdir}/base", "base"))
    sequences, length = datastore.arrays["next_tokens"].shape
    forward = language_model.forward_flops(base, length, output_projection=False)
    assert (
        cost_of["knn_lm"]["construction_flops"]
        == sequences * length * forward
        < cost_of["memory"]["construction_flops"]
    )
    assert cost_of["base"]["construction_flops"] == cost_of["rag"]["construction_flops"] == 0


def test_fine_tuning_of_the_base_and_a_model_of_keys_are_counted_once():
    def artifact(**members):
        return types.SimpleNamespace(**{"summary": {}, "config": {}, "inputs": {}, "path": "nowhere"} | members)

    dimensions = {"vocab_size": 100, "context_length": 8, "width": 16, "blocks": 2, "heads": 2}
    keys = {**dimensions, "width": 32, "blocks": 3}
    base = artifact(summary={"model": dimensions, "parameter_count": 5, "training_flops": 1e9})
    parts = {
        "base": base,
        "memory": artifact(summary={"parameter_count": 3, "training_flops": 2e9}),
        "datastore": artifact(arrays={"next_tokens": np.zeros((10, 8))}),
        "targets": artifact(config={"backend": "exact", "k": 4}),
        "key_model": artifact(summary={"model": keys}),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs.provenance, "artifact_bytes", lambda artifact: 1)
        actual = costs.cost(smoke.get_config(), parts, seconds=1.0)
        assert costs.cost(smoke.get_config(), {"base": base}, seconds=1.0)["training_flops"] == 0
    assert actual["training_flops"] == 2e9
    assert (actual["parameters"], actual["bytes"]) == (8, 2)
    models = [saved.language_model_config(artifact(summary={"model": of})) for of in (dimensions, keys)]
    forward = sum(language_model.forward_flops(model, 8, output_projection=False) for model in models)
    assert actual["construction_flops"] == 80 * forward + 2 * 32 * 80 * 80


@pytest.mark.parametrize(
    ("name", "scores_of", "parts"),
    [
        ("base", ("base", False), ["model"]),
        ("memory", ("base", False), ["model", "memory"]),
        ("knn_lm", ("base", False), ["model", "knn"]),
        ("knn_lm", ("base", True), []),
        ("rag", ("base", True), ["model"]),
        ("cpt", ("base", False), []),
        ("cpt+memory", ("base", False), ["model", "memory"]),
        ("cpt+memory", ("continued", False), ["model"]),
        ("lora", ("continued", False), []),
    ],
)
def test_a_system_is_charged_for_what_it_computes(name, scores_of, parts):
    assert compare._parts_of(systems.SYSTEMS[name], *scores_of) == parts


def test_an_adapted_model_has_the_parameters_of_the_memory(config, compared):
    adapted = open_artifact(f"{config.workdir}/lora", "base").summary
    blocks = 16 * 64 * 2 + 64 + 3 * 16 + 2 * 16  # of the memory: two matrices, their biases, two norms
    assert adapted["adapter_parameters"] == pytest.approx(blocks, rel=0.5)
    assert set(adapted["rate_search"]) == {"0.0001", "0.0003", "0.001"}
    assert not pathlib.Path(config.workdir, "lora/rates").exists()


def test_again_it_computes_nothing(config, compared, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("computed again")

    monkeypatch.setattr(compare, "read", refuse)
    monkeypatch.setattr(greedy, "generate", refuse)
    again = compare.run(config)
    assert again["tasks"] == compared["tasks"]


def test_every_system_is_timed_at_every_size_that_fits(config, compared, monkeypatch):
    other = config.copy_and_resolve_references()
    other.comparison.systems = "base,memory,knn_lm,rag"
    other.comparison.speed.update({"positions": "500,5000,90000", "prompt_tokens": 12, "new_tokens": 2, "rounds": 2})
    monkeypatch.setattr(speed, "BATCHES", (2,))
    monkeypatch.setattr(searching, "EXACT", 2000)
    monkeypatch.setattr(speed, "EXACT", 2000)
    check_room = speed._check_room

    def check(workdir, positions, *arguments):
        with monkeypatch.context() as patch:
            if positions == 90_000:
                patch.setattr(speed.host, "memory_bytes", lambda: 1000)
            check_room(workdir, positions, *arguments)

    monkeypatch.setattr(speed, "_check_room", check)
    folder = pathlib.Path(config.workdir, "comparison/index")
    kept_files = sorted(folder.rglob("*"))
    actual = speed.run(other)
    synthesized = [file for file in folder.glob("speed_*") if file not in kept_files]
    assert len(synthesized) == 1  # the real keys' index; that of noisy copies is deleted
    timed = {(one["system"], one["positions"], one["batch"]): one for one in actual["measured"]}
    fits = {"base": 3, "memory": 3, "knn_lm": 2, "rag": 3}
    assert len(timed) == len(actual["measured"]) == sum(fits.values()) * len(speed.BATCHES)
    for one in timed.values():
        assert len(one["first"]) == len(one["next"]) == 2
        assert min(*one["first"], *one["next"]) > 0
        assert (one["prompt_tokens"] > 12) == (one["system"] == "rag")
    reasons = {(one["system"], one["positions"]): one["reason"] for one in actual["skipped"]}
    assert reasons.keys() == {("knn_lm", 90000)}
    assert "GiB of memory, this machine has" in reasons["knn_lm", 90000]
    assert json.loads(pathlib.Path(config.workdir, "comparison/speed.json").read_text())["skipped"] == actual["skipped"]
    shown = pathlib.Path(config.workdir, "comparison/index.html").read_text()
    assert "Speed by the size of the corpus" in shown
    assert "What they cost" in shown


def test_prompts_that_are_longer_than_the_text_are_refused(config):
    other = config.copy_and_resolve_references()
    other.comparison.speed.prompt_tokens = 10**6
    with pytest.raises(UserError, match=r"speed\.prompt_tokens: 8 prompts of 1000000 tokens"):
        speed.run(other)


def test_other_questions_are_scored_anew(config, compared, monkeypatch):
    read = []
    monkeypatch.setattr(compare, "read", lambda *arguments: read.append(1) or reading.read(*arguments))
    other = config.copy_and_resolve_references()
    other.comparison.update({"tasks": "rt", "systems": "base", "limit": 3})
    assert compare.run(other)["tasks"]["rt"]["questions"] == 3
    assert read
    other.comparison.systems = "base,knn_lm"
    compare.run(other)
    read.clear()
    other.targets.k -= 1  # comparison.k is 0, which means this one
    compare.run(other)
    assert read


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"systems": "base,memmory"}, "comparison system 'memmory': unknown; expected some of base, memory"),
        ({"tasks": "rt,rtt"}, "comparison task 'rtt': unknown task; expected some of agn"),
        ({"tasks": ""}, "config.comparison.tasks: is empty"),
        ({"tasks": "nq"}, r"nq.test\.jsonl: does not exist, compressed .* config.comparison.data is the folder"),
        ({"tasks": "rt", "systems": "rag", "retriever": "no/such/folder"}, "no/such/folder holds no sentence encoder"),
    ],
)
def test_what_cannot_work_is_refused(config, compared, changes, message):
    other = config.copy_and_resolve_references()
    other.comparison.update(changes)
    with pytest.raises(UserError, match=message):
        compare.run(other)


def test_passages_of_another_text_are_refused(config, compared, tmp_path):
    data = write_data(tmp_path)
    file = data / "nq/nq-open-oracle.jsonl"
    file.write_text(file.read_text().replace("town", "village"))
    other = config.copy_and_resolve_references()
    other.comparison.update({"data": str(data), "tasks": "passages"})
    with pytest.raises(ConfigError, match="none of its 24 passages is in the training text"):
        compare.run(other)


def test_weights_are_tuned_on_the_other_half():
    values_ZxN = np.zeros((2, 10))
    first_N = weights.halves(10, seed=3)
    values_ZxN[1, first_N] = 1.0  # the second weight helps the first half alone
    np.testing.assert_array_equal(weights.tuned(values_ZxN, None, seed=3), np.where(first_N, 0, 1))
    tuning_values = np.array([[0.0, 0.0], [0.0, 1.0]])
    np.testing.assert_array_equal(weights.tuned(values_ZxN, tuning_values, seed=3), np.ones(10))


def test_a_text_that_is_too_long_loses_its_beginning():
    row = packing.Row.of_continuation(list(range(6)), list(range(9)))
    assert (list(row.tokens_T), list(row.positions_P), row.ids_PxJ) == (list(range(8)), [5, 6, 7], [[6], [7], [8]])
    kept = row.truncated(4)
    assert (list(kept.tokens_T), kept.positions_P, kept.ids_PxJ) == ([4, 5, 6, 7], [1, 2, 3], [[6], [7], [8]])


def test_every_task_has_what_the_command_needs():
    for name in tasks.names():
        task = tasks.find(name)
        assert all((task.title, task.headline, task.tuned_on, task.source)), name
        assert "{" in task.template, name
        assert bool(task.stop) <= bool(task.max_new_tokens)


def test_continuations_of_one_token_share_a_row(config):
    workdir = systems.Workdir(config)
    encode = scores.encoder(read_tokenizer(workdir.tokens))
    task = tasks.find("halueval_qa")
    question = {"instruction": "Judge.", "question": "q", "shown": "a"}
    encoded = scores.encode_questions(
        task, [tasks._halueval.Question("1", "q", question, (" a", " b"), gold=0)], None, encode, 512
    )
    lengths = [len(encode([" a"])[0]), len(encode([" b"])[0])]
    assert len(encoded.rows) == (1 if lengths == [1, 1] else 2)
