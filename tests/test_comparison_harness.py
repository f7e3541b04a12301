"""lm-evaluation-harness over our systems, against its own `hf` model on the folder that we export."""

import json
import os
import pathlib
import re

import lm_eval.models.huggingface
import numpy as np
import pytest
import tokenizers
from comparison_data import small_run
from lm_eval.api.instance import Instance

from configs import smollm2_nq
from mlpmem_jax.comparison import harness, scoring_benchmark, systems, tasks
from mlpmem_jax.core.errors import ConfigError
from mlpmem_jax.inference.weight import find_weight
from mlpmem_jax.interop import export_model

ROOT = pathlib.Path(__file__).parents[1]
WORKDIR = pathlib.Path(os.environ.get("MLPMEM_WORKDIR", ROOT / "runs" / "smollm2_nq"))
DATA = pathlib.Path(os.environ.get("MLPMEM_EVALUATION_DATA", ROOT / "data" / "evaluation"))
REQUESTS = 100
TEXTS = [
    "Aldford is a town on the river Arrow.",
    "Its 7 mills were built long ago. Brenham is",
    "which river is Corwick on",
    "Eldton, a town",
]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    with small_run(tmp_path_factory.mktemp("harness")) as config:
        yield config


@pytest.fixture(scope="module")
def workdir(config):
    return systems.Workdir(config)


@pytest.fixture(scope="module")
def ours(config, workdir):
    weight = find_weight(workdir.path, workdir.artifact("memory", "memory")).value
    return harness._harness_model(harness.Answering(workdir, "memory", weight))


@pytest.fixture(scope="module")
def theirs(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    export_model.transformers_folder(config, str(folder))
    return lm_eval.models.huggingface.HFLM(
        pretrained=str(folder), trust_remote_code=True, device="cpu", dtype="float32", batch_size=1
    )


def requests(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=one, idx=index) for index, one in enumerate(arguments)]


def test_log_likelihoods(ours, theirs):
    # Texts differ: of one text in two places the harness's own model would read the first place twice.
    pairs = [(text[:place], text[place:]) for text, place in zip(TEXTS, (12, 9, 2, 1), strict=True)]
    asked = requests("loglikelihood", *pairs, ("", "Aldford"))
    expected, actual = (model.loglikelihood(asked, disable_tqdm=True) for model in (theirs, ours))
    np.testing.assert_allclose([value for value, _ in actual], [value for value, _ in expected], rtol=1e-3, atol=1e-3)
    assert [greedy for _, greedy in actual] == [greedy for _, greedy in expected]


def test_rolling_log_likelihoods(ours, theirs):
    asked = requests("loglikelihood_rolling", *[(text,) for text in TEXTS])
    expected, actual = (model.loglikelihood_rolling(asked, disable_tqdm=True) for model in (theirs, ours))
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)


def test_tokens_before_a_text_are_asked_for_as_its_own_model_does(workdir, theirs, monkeypatch):
    """Of a tokenizer such as Llama's, which puts one before every text."""
    answering, pairs = harness.Answering(workdir, "memory", 0.5), {"ours": [], "theirs": []}
    begin = workdir.tokens.summary["end_of_text_id"] + 1
    name = answering._tokenizer.id_to_token(begin)
    processor = tokenizers.processors.TemplateProcessing(f"{name} $A", special_tokens=[(name, begin)])
    answering._begin, answering.prefix = [begin], begin
    monkeypatch.setattr(theirs.tokenizer._tokenizer, "post_processor", processor)
    monkeypatch.setattr(theirs, "custom_prefix_token_id", begin)

    def record(who):
        def score(requests, *arguments, **options):
            pairs[who] += [tuple(map(list, request[-2:])) for request in requests]
            return [(0.0, True)] * len(requests)

        return score

    monkeypatch.setattr(theirs, "_loglikelihood_tokens", record("theirs"))
    monkeypatch.setattr(answering, "score", record("ours"))
    for model in (theirs, harness._harness_model(answering)):
        model.loglikelihood(requests("loglikelihood", ("", "Aldford"), ("Its 7", " mills")), disable_tqdm=True)
        model.loglikelihood_rolling(requests("loglikelihood_rolling", *[(text,) for text in TEXTS]), disable_tqdm=True)
    assert pairs["ours"] == pairs["theirs"]
    assert pairs["ours"][0][0] == [begin]
    assert begin not in pairs["ours"][0][1]


def test_greedy_texts(ours, theirs):
    options = {"until": ["\n", "."], "max_gen_toks": 12, "do_sample": False}
    others = options | {"until": "a", "max_gen_toks": 5}
    asked = requests("generate_until", *[(text, (options, others)[place % 2]) for place, text in enumerate(TEXTS)])
    expected, actual = (model.generate_until(asked, disable_tqdm=True) for model in (theirs, ours))
    assert actual == expected


@pytest.fixture(scope="module")
def real():
    """SmolLM2-135M with a memory, as `make smollm2-nq` leaves it, and the questions of its passages."""
    if not (WORKDIR.exists() and DATA.exists()):
        pytest.skip("needs MLPMEM_WORKDIR, a finished `make smollm2-nq`, and MLPMEM_EVALUATION_DATA")
    config = smollm2_nq.get_config()
    config.workdir = str(WORKDIR)
    return config, tasks.find("passages").load(DATA)["test"][:REQUESTS]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "memory"])
def test_requests_to_a_real_model(real, name, tmp_path):
    config, questions = real
    workdir = systems.Workdir(config)
    weight = find_weight(workdir.path, workdir.artifact("memory", "memory")).value if name == "memory" else 0.0
    export_model.transformers_folder(config, str(tmp_path / "model"))
    theirs = lm_eval.models.huggingface.HFLM(
        pretrained=str(tmp_path / "model"), trust_remote_code=True, device="cpu", dtype="float32", batch_size=1
    )
    theirs.model.config.interpolation_weight = weight
    ours = harness._harness_model(harness.Answering(workdir, name, weight))
    prompts = [tasks.find("passages").prompt(question) for question in questions]
    asked = requests("loglikelihood", *[(p, q.continuations[0]) for p, q in zip(prompts, questions, strict=True)])
    expected, actual = (model.loglikelihood(asked, disable_tqdm=True) for model in (theirs, ours))
    np.testing.assert_allclose([value for value, _ in actual], [value for value, _ in expected], rtol=0, atol=1e-3)
    assert [greedy for _, greedy in actual] == [greedy for _, greedy in expected]
    options = {"until": ["\n"], "max_gen_toks": 15, "do_sample": False}
    asked = requests("generate_until", *[(prompt, options) for prompt in prompts])
    expected, actual = (model.generate_until(asked, disable_tqdm=True) for model in (theirs, ours))
    assert actual == expected


def test_a_task_of_a_local_file(config, tmp_path, capsys):
    rows = [{"question": f"{text} a or b", "gold": index % 2} for index, text in enumerate(TEXTS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "two_letters", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "doc_to_text": "{{question}}", "doc_to_target": "gold", "doc_to_choice": ["a", "b"],
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "two_letters.yaml").write_text(json.dumps(task))  # JSON is YAML
    actual = harness.run(config, "base,memory", f"lm_eval:{tmp_path / 'two_letters.yaml'}", None)
    assert set(actual) == {"base", "memory"}
    assert 0 <= actual["memory"]["results"]["two_letters"]["acc,none"] <= 1
    assert "two_letters" in capsys.readouterr().out


def test_scoring_is_measured_beside_its_own_model(config, monkeypatch):
    monkeypatch.setattr(scoring_benchmark, "PROMPT", 12)
    monkeypatch.setattr(scoring_benchmark, "ANSWER", 5)
    rows = scoring_benchmark.rows(config)
    assert [row["unit"] for row in rows] == ["questions/s", "questions/s", "ratio"]
    assert float(re.search(r"(\S+) nats", rows[2]["detail"])[1]) < 1e-3


@pytest.mark.parametrize(
    ("names", "tasks", "message"),
    [
        ("base", "hellaswag", "task 'hellaswag': expected lm_eval:NAME"),
        ("base", "lm_eval:no/such.yaml", r"no/such.yaml does not exist"),
        ("rag", "lm_eval:hellaswag", "comparison system 'rag': the harness passes no questions"),
        ("cpt+memory", "lm_eval:hellaswag", "comparison system 'cpt.memory': mixes two language models"),
    ],
)
def test_what_cannot_be_asked_is_refused(config, names, tasks, message):
    with pytest.raises(ConfigError, match=message):
        harness.run(config, names, tasks, None)
