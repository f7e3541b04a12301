"""Scores of the base in choice tasks, against the protocols written once more on PyTorch (`comparison_reference`)."""

import csv
import json
import os
import pathlib

import numpy as np
import pytest
import torch
import transformers
from comparison_data import one_device, small_run
from comparison_reference import FUZZY, SENTIMENT, Reference, words_of

from configs import smollm2
from mlpmem_jax import stages
from mlpmem_jax.comparison import compare, tasks
from mlpmem_jax.core.artifacts import open_artifact
from mlpmem_jax.corpus.tokens import read_tokenizer

ROOT = pathlib.Path(__file__).parents[1]
DATA = pathlib.Path(os.environ.get("MLPMEM_EVALUATION_DATA", ROOT / "data" / "evaluation"))
ROWS = int(os.environ.get("MLPMEM_EVALUATION_ROWS", 200))  # of each task
WORDS = "rivers,mills and,towns , a river\nmill; king,long ago\n"


def rows_of(name):
    """Three rows in the format that the task is published in, about the text that the small run has read."""
    text = ["Aldford is a town", "  Its 7 mills were built, long ago. ", 'Fal: a "river"\nor a town?']
    labels = {
        "sst2": ["1", "3", "5"], "cb": ["neutral", "entailment", "contradiction"], "agn": ["4", "2", "1"],
        "rte": ["entailment", "not_entailment", "entailment"], "rt": ["negative", "positive", "positive"],
        "yahoo": [3, 0, 9],
    }.get(name, ["0", "1", "1"])  # fmt: skip
    keys = {
        "cb": ("premise", "hypothesis", "label"), "rte": ("premise", "hypothesis", "label"),
        "agn": ("Title", "Description", "Class Index"), "rt": ("input", "input", "output"),
        "yahoo": ("question_title", "best_answer", "topic"),
    }.get(name, ("text", "text", "label"))  # fmt: skip
    return [dict(zip(keys, (one, one, label), strict=True)) for one, label in zip(text, labels, strict=True)]


def write_data(folder):
    for name, (file, *_) in FUZZY.items():
        (folder / "pmi" / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / "pmi" / file).write_text("".join(json.dumps(row) + "\n" for row in rows_of(name)))
    (folder / "pmi" / SENTIMENT).write_text(WORDS)
    (folder / "pmi" / "agn" / "label_names_kb.txt").write_text("world\nsports, town\nbusiness, king\nscience\n")
    (folder / "halueval").mkdir()
    names = ("Aldford", "Corton", "Falwick")
    facts = [(f"What is {name}?", f"{name} is a town", f"{name} is a river") for name in names]
    keys = ("question", "right_answer", "hallucinated_answer")
    lines = [json.dumps(dict(zip(keys, fact, strict=True))) + "\n" for fact in facts]
    (folder / "halueval" / "qa_one-turn_data.json").write_text("".join(lines))
    (folder / "halueval" / "qa_evaluation_instruction.txt").write_text('Judge. Answer \\"Yes\\" or \\"No\\".')
    with (folder / "truthfulqa" / "TruthfulQA.csv").open("a", newline="") as file:
        csv.writer(file).writerow(["Where?", "By the river.", "By the river.;A river", "In a mill; nowhere;By a river"])


def check(config, reference, nearly):
    """Compares every score of every question that was asked to within `nearly`; {task: {row number: our answer}}."""
    compare.run(config)
    lines = pathlib.Path(config.workdir, "comparison/answers.jsonl").read_text().splitlines()
    ours = {}
    for line in map(json.loads, lines):
        ours.setdefault(line["task"], {})[int(line["id"])] = line | line["systems"]["base"]
    for name, asked in ours.items():
        words = 1
        if name == "truthfulqa":
            theirs = reference.truthfulqa(asked)
            for number, (_, *measures) in theirs.items():
                actual = [asked[number][measure] for measure in ("MC1", "MC2", "MC3")]
                np.testing.assert_allclose(actual, measures, atol=nearly, err_msg=f"{name}, row {number}")
            theirs = {number: scores for number, (scores, *_) in theirs.items()}
        elif name == "halueval_qa":
            theirs = reference.halueval_qa({number: line["gold"] for number, line in asked.items()})
        else:
            theirs, words = reference.fuzzy(name, asked)
        for number, scores in theirs.items():
            actual = asked[number]["scores"]
            # A label's score adds up as many differences of log-probabilities as it has words.
            np.testing.assert_allclose(
                actual, scores, rtol=nearly, atol=nearly * words, err_msg=f"{name}, row {number}"
            )
            if name != "truthfulqa":
                assert asked[number]["accuracy"] == float(np.argmax(actual) == asked[number]["gold"])
        if name != "truthfulqa":
            shares = [
                np.mean([np.argmax(scores[number]) == line["gold"] for number, line in asked.items()])
                for scores in (theirs, {number: line["scores"] for number, line in asked.items()})
            ]
            assert abs(shares[0] - shares[1]) <= 0.01, f"{name}: {shares}"
            print(f"{name}: {len(asked)} rows, accuracy {shares[1]:.3f}, of the reference {shares[0]:.3f}")
    return ours


def test_choice_tasks(tmp_path):
    with small_run(tmp_path, finished=("tokens",)) as config:
        write_data(pathlib.Path(config.comparison.data))
        tokens = open_artifact(f"{config.workdir}/tokens", "tokens")
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = transformers.LlamaConfig(
            **sizes, num_key_value_heads=2, vocab_size=300, max_position_embeddings=2048, initializer_range=0.4
        )
        transformers.set_seed(0)
        model = transformers.LlamaForCausalLM(model)
        model.save_pretrained(tmp_path / "model")
        config.base.update({"source": "huggingface", "path": str(tmp_path / "model")})
        stages.run("base", config)
        config.comparison.update({"systems": "base", "tasks": "sst2,hyp,agn,truthfulqa,halueval_qa", "limit": 0})
        asked = check(config, Reference(model, read_tokenizer(tokens), config.comparison.data), nearly=1e-3)
    counts = {"sst2": 2, "hyp": 3, "agn": 3, "truthfulqa": 5, "halueval_qa": 3}
    assert {name: len(lines) for name, lines in asked.items()} == counts


@pytest.mark.parametrize("name", FUZZY)
def test_prompts_and_words(tmp_path, name):
    (tmp_path / "truthfulqa").mkdir()
    write_data(tmp_path)
    _, prompt, domain, _ = FUZZY[name]
    task = tasks.find(name)
    assert task.domain == domain
    for question in task.load(tmp_path)["test"]:
        row = dict(rows_of(name)[int(question.id) - 1])
        if name == "hyp":
            row["text"] = row["text"].strip()
        assert task.prompt(question) == prompt.format(**row)
        assert question.words == tuple(tuple(f" {word}" for word in group) for group in words_of(tmp_path, name))


@pytest.fixture(scope="module")
def smollm2_run(tmp_path_factory):
    """SmolLM2-135M as the base of a working directory, and as transformers reads the same file."""
    file = ROOT / smollm2.MODEL
    if not (file.exists() and DATA.exists()):
        pytest.skip(f"needs {file} (make smollm2-model), and the tasks' files in MLPMEM_EVALUATION_DATA or {DATA}")
    config = smollm2.get_config()
    config.workdir = str(tmp_path_factory.mktemp("smollm2"))
    config.corpus.max_bytes = 200_000
    config.tokenizer.path = config.base.path = str(file)
    config.comparison.update({"systems": "base", "data": str(DATA), "limit": ROWS})
    with one_device():
        for stage in ("tokens", "base"):
            stages.run(stage, config)
        model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = read_tokenizer(open_artifact(f"{config.workdir}/tokens", "tokens"))
        yield config, Reference(model, tokenizer, DATA)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(name for name in FUZZY if name != "yahoo"), "truthfulqa", "halueval_qa"])
def test_choice_tasks_of_smollm2(smollm2_run, name):
    config, reference = smollm2_run
    config.comparison.tasks = name
    check(config, reference, nearly=5e-3)
