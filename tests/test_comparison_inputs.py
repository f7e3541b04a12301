"""What tasks are read from: files, data sets of the hub by name, words; and what they refuse."""

import csv
import itertools
import json
import re
import types

import jax
import numpy as np
import pytest
import tokenizers
from etils import epath
from workdirs import write_datastore

from mlpmem_jax.comparison import hub, metrics, passages, scores, searching, tasks
from mlpmem_jax.comparison.hub import DataSet
from mlpmem_jax.comparison.question import Question, Task
from mlpmem_jax.core.errors import ConfigError, UserError
from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.retrieval.quality import contains

NINE = ("sst2", "mr", "cr", "rt", "hyp", "cb", "rte", "agn", "yahoo")


def encode(texts):
    """A character is a token, but for some words that are one; a space in front of a word is part of its token."""
    words = {" good": [900], " bad": [901], " awful": [902]}
    parts = [re.split(f"({'|'.join(words)})", text) for text in texts]
    return [[1, *itertools.chain(*(words.get(part) or map(ord, part) for part in of))] for of in parts]


def words_task(**changes):
    return Task(
        title="t", load=None, template="{text}", measure=metrics.domain_pmi, headline="accuracy", tuned_on="accuracy",
        domain="so", **changes,
    )  # fmt: skip


def words_question(*groups):
    return Question("1", "", {"text": "it is"}, words=groups, gold=0)


def write_data_set(folder, subset, split, rows):
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(
        f"---\nconfigs:\n  - config_name: {subset or 'default'}\n    data_files:\n      - split: {split}\n"
        f"        path: {split}.jsonl\n---\n"
    )
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_rows_of_the_hub_become_published_files(here):
    write_data_set(
        here / "truthfulqa/truthful_qa", "generation", "validation",
        [
            {"question": "Is it?", "best_answer": "Yes", "correct_answers": ["Yes", "It is"],
             "incorrect_answers": ["No"]}
        ],
    )  # fmt: skip
    write_data_set(here / "cornell-movie-review-data/rotten_tomatoes", "", "test", [{"text": "a film", "label": 1}])
    write_data_set(
        here / "mandarjoshi/trivia_qa", "unfiltered.nocontext", "validation",
        [{"question": "Who?", "answer": {"aliases": ["He", "Him"], "value": "He"}}],
    )  # fmt: skip
    folder = here / "data"
    for name in ("truthfulqa", "rt"):
        hub.fetch(folder, tasks.find(name).hub)
    (truthful,) = tasks.find("truthfulqa").load(folder)["test"]
    assert truthful.continuations == (" Yes.", " It is.", " No.")
    assert truthful.gold == (2, 0)
    (review,) = tasks.find("rt").load(folder)["test"]
    assert (review.fields["input"], review.gold) == ("a film", 1)
    trivia = {"triviaqa/test.jsonl": tasks.find("triviaqa").hub["triviaqa/test.jsonl"]}
    hub.fetch(folder, trivia)
    assert json.loads((folder / "triviaqa/test.jsonl").read_text())["answer"] == ["He", "Him"]
    (folder / "triviaqa/test.jsonl").write_text("mine")
    hub.fetch(folder, trivia)
    assert (folder / "triviaqa/test.jsonl").read_text() == "mine"


def test_drawn_rows_are_those_of_the_published_seed(here):
    write_data_set(here / "some/set", "", "test", [{"number": number} for number in range(50)])
    hub.fetch(here / "data", {"rows.jsonl": DataSet("some/set", "test", drawn=5)})
    rows = [json.loads(line)["number"] for line in (here / "data/rows.jsonl").read_text().splitlines()]
    np.random.seed(42)
    assert rows == np.random.choice(50, 5, replace=False).tolist()


@pytest.mark.parametrize(
    ("data_set", "message"),
    [
        (DataSet("no/such", "test"), r"'no/such' \(subset '', split 'test'\) could not be loaded"),
        (DataSet("some/set", "test", columns={"a": "b"}), "'some/set' has no column 'b'; found"),
    ],
)
def test_a_data_set_that_is_not_there_is_refused(here, data_set, message):
    write_data_set(here / "some/set", "", "test", [{"number": 1}])
    with pytest.raises(UserError, match=message):
        hub.fetch(here / "data", {"rows.jsonl": data_set})


@pytest.mark.parametrize("name", NINE)
def test_the_second_wording_has_the_data_of_the_first(name):
    first, second = tasks.find(name), tasks.find(f"{name}_knn_prompt")
    assert second.single_tokens > first.single_tokens
    assert second.hub == first.hub


def test_words_of_several_tokens_count_by_their_first_one_or_not_at_all():
    question = words_question((" good", " xyz"), (" bad", " awful"))
    encoded = scores.encode_questions(words_task(), [question], None, encode, 99)
    assert encoded.rows[0].ids_PxJ == [[900, ord(" "), 901, 902]]
    encoded = scores.encode_questions(words_task(single_tokens=True), [question], None, encode, 99)
    assert encoded.rows[0].ids_PxJ == encoded.rows[encoded.domain_row].ids_PxJ == [[900, 901, 902]]
    model = [np.log([[0.3, 0.2, 0.1]]), np.log([[0.1, 0.1, 0.1]])]
    answer = scores.answer(encoded, 0, model, None, 0.0)
    np.testing.assert_allclose(metrics.choice_scores(answer), np.log([3, 2]), rtol=1e-6)


def test_words_of_llama_2_are_not_the_space_before_them():
    """Its tokenizer puts a space in front of every text, so that " good" alone begins with two."""
    words = ["▁it", "▁is", "▁good", "▁bad"]
    steps = [(word[:end], word[end]) for word in words for end in range(1, len(word))]
    pieces = ["<s>", *sorted({*"".join(words), *(a + b for a, b in steps)})]
    model = tokenizers.models.BPE({piece: number for number, piece in enumerate(pieces)}, list(dict.fromkeys(steps)))
    tokenizer = tokenizers.Tokenizer(model)
    normalizers = tokenizers.normalizers
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    question = words_question((" good",), (" bad",))
    for single_tokens in (False, True):
        task = words_task(single_tokens=single_tokens)
        encoded = scores.encode_questions(task, [question], None, scores.encoder(tokenizer), 99)
        assert encoded.rows[0].ids_PxJ == [[pieces.index("▁good"), pieces.index("▁bad")]]


def test_words_of_a_file_follow_those_of_the_task(tmp_path):
    (tmp_path / "words.json").write_text(json.dumps({"a": ["fine", "well", "nice"], "b": ["ill", "sad"]}))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "x", "label": 1}))
    (tmp_path / "mood.toml").write_text(
        'title = "Mood"\nsource = "our own"\nfile = "rows.jsonl"\nfields = ["text"]\nprompt = "{text}"\ndomain = "so"\n'
        'label = "label"\nlabels = ["0", "1"]\nword_file = "words.json"\nfirst_words = [["good"], ["bad"]]\n'
    )
    (question,) = tasks.find(str(tmp_path / "mood.toml")).load(tmp_path)["test"]
    assert question.words == ((" good", " fine", " well"), (" bad", " ill", " sad"))
    assert question.gold == 1
    with pytest.raises(ConfigError, match=r"nothing\.toml': file not found"):
        tasks.find(str(tmp_path / "nothing.toml"))


@pytest.mark.parametrize(
    ("task", "question", "message"),
    [
        (words_task(), words_question((" good",), ("",)), "no token for the word ''"),
        (words_task(single_tokens=True), words_question((" good",), (" xyz", " x y")), "no single token for any"),
    ],
)
def test_words_that_no_token_stands_for_are_refused(task, question, message):
    with pytest.raises(ConfigError, match=message):
        scores.encode_questions(task, [question], None, encode, 99)


def write_task_files(folder, name, rows):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if isinstance(rows, str):
        (folder / name).write_text(rows)
    elif name.endswith(".csv"):
        with (folder / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


ORACLE = "nq/nq-open-oracle.jsonl"
TRUTHFUL = {"Question": "q?", "Best Answer": "a", "Correct Answers": "b", "Incorrect Answers": "c"}


@pytest.mark.parametrize(
    ("task", "file", "rows", "message"),
    [
        ("hotpotqa", "hotpotqa/dev.json", [{"question": "q", "answer": " "}], "dev.json: row 1 has no answers"),
        ("hotpotqa", "hotpotqa/dev.json", [{"question": " ", "answer": "a"}], "dev.json: row 1 has no question"),
        ("hotpotqa", "hotpotqa/dev.json", [{"question": "q"}], "dev.json: row 1 has no answer"),
        ("hotpotqa", "hotpotqa/dev.json", [], "dev.json: has no rows"),
        ("hotpotqa", "hotpotqa/dev.json", [{"question": None, "answer": "a"}], "row 1 has no question"),
        (
            "hotpotqa",
            "hotpotqa/dev.json",
            [{"question": 5, "answer": "a"}],
            "row 1: expected text at 'question', found a",
        ),
        (
            "hotpotqa",
            "hotpotqa/dev.json",
            [{"question": "q\ud83d", "answer": "a"}],
            "row 1 has half of a surrogate pair",
        ),
        (
            "hotpotqa",
            "hotpotqa/dev.json",
            [{"question": "q", "answer": {"value": "a", "aliases": ["b"]}}],
            "row 1: expected answers as text or a list of texts, found {'value'",
        ),
        ("hotpotqa", "hotpotqa/dev.json", [{"question": "q", "answer": [1945]}], r"a list of texts, found \[1945\]"),
        ("passages", ORACLE, [{"question": "q", "answers": ["a"], "ctxs": []}], "row 1: expected 'ctxs' to be a list"),
        ("passages", ORACLE, [{"question": "q", "answers": ["a"], "ctxs": [{"text": ""}]}], "first entry has a 'text'"),
        ("rt", "pmi/rt/test.jsonl", [{"input": None, "output": "positive"}], "row 1 has no input"),
        (
            "truthfulqa",
            "truthfulqa/TruthfulQA.csv",
            "Question,Best Answer,Correct Answers,Incorrect Answers\nq?,a",
            "row 1",
        ),
        ("rt", "pmi/rt/test.jsonl", [{"input": "a", "output": "neutral"}], "row 1 has the label 'neutral'; expected"),
        ("truthfulqa", "truthfulqa/TruthfulQA.csv", [TRUTHFUL], "row 1: the best answer is not a correct one"),
    ],
)
def test_rows_that_cannot_be_asked_are_refused(tmp_path, task, file, rows, message):
    write_task_files(tmp_path, file, rows)
    with pytest.raises(UserError, match=message):
        tasks.find(task).load(tmp_path)


def test_a_table_that_begins_with_a_byte_order_mark_is_read(tmp_path):
    row = TRUTHFUL | {"Correct Answers": "a"}
    write_task_files(tmp_path, "truthfulqa/TruthfulQA.csv", [row])
    file = tmp_path / "truthfulqa" / "TruthfulQA.csv"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert [question.query for question in tasks.find("truthfulqa").load(tmp_path)["test"]] == ["q?"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", 'title = "A"\n', "has no 'source'"),
        ("a.toml", "title = A", "cannot be read .TOMLDecodeError"),
        ("a.py", "x = 1", "has no TASK"),
        ("a.py", "import nothing_of_this_name", "cannot be read .ModuleNotFoundError"),
    ],
)
def test_a_file_that_is_no_task_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}'?: {message}"):
        tasks.find(str(tmp_path / name))


def test_the_index_of_another_encoder_in_the_same_folder_is_another(tmp_path, monkeypatch):
    class Encoder:
        def __init__(self, folder, device):
            self.random = np.random.default_rng(len(next(epath.Path(folder).iterdir()).read_text()))

        def encode(self, texts, **options):
            return self.random.normal(size=(len(texts), 4)).astype(np.float32)

    monkeypatch.setattr(passages, "require", lambda *names, **extra: types.SimpleNamespace(SentenceTransformer=Encoder))
    folders = []
    for weights in ("a", "a", "ab"):
        (tmp_path / "weights").write_text(weights)
        folders.append(passages.Dense(["a", "b"], str(tmp_path), {}, None, tmp_path)._open.keywords["folder"])
    assert folders[0] == folders[1] != folders[2]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"{", b"[]", b"{}"])
def test_damaged_results_are_computed_again(tmp_path, content):
    values = {"model": [np.array([[-1.0]])], "knn": [np.array([[-2.0]])]}, {"model": 1.5, "knn": 2.5}
    files = [epath.Path(tmp_path / name) for name in ("a.npz", "a.json")]
    for file in files:
        file.write_bytes(content)
    assert scores.cached_scores(files[0], "made of this", lambda: values) == values
    assert scores.cached_texts(files[1], "made of this", lambda: ["a"])[0] == ["a"]
    assert scores.cached_scores(files[0], "made of this", lambda: None) == values
    assert scores.cached_texts(files[1], "made of this", lambda: None)[0] == ["a"]


def test_a_prompt_that_is_too_long_loses_its_beginning_and_is_counted():
    task = Task("t", None, "{text}", metrics.open_answer, "exact match", "gold log-probability", max_new_tokens=4)
    questions = [Question(str(n), "", {"text": text}, (" y",)) for n, text in enumerate(("abcdefghijkl", "abc"))]
    encoded = scores.encode_questions(task, questions, None, encode, 9)
    assert encoded.truncated == 1
    assert encoded.prompt_ids == [[*map(ord, "hijkl")], [1, *map(ord, "abc")]]
    assert encoded.rows[0].tokens_T == [*map(ord, "efghijkl ")]
    with pytest.raises(ConfigError, match="generates 4 tokens, which leaves no room for a prompt in a context of 4"):
        scores.encode_questions(task, questions, None, encode, 4)


def test_a_corpus_without_passages_is_refused(monkeypatch):
    monkeypatch.setattr(passages, "documents", lambda tokens: ["", " \n"])
    with pytest.raises(ConfigError, match="some/tokens: its training split has no words"):
        passages.open_retriever("bm25", types.SimpleNamespace(path="some/tokens"), 100, {}, None, None)


def test_an_encoder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match=f"config.comparison.retriever: {tmp_path} holds no sentence encoder"):
        passages.Dense(["a"], str(tmp_path), {}, None, tmp_path)


def made_vectors(count):
    random = np.random.default_rng(0)
    return random.normal(size=(6000, 16)).astype(np.float32), random.normal(size=(count, 16)).astype(np.float32)


@pytest.mark.parametrize(("backend", "most"), [("scann", 5000), ("exact", 5000), ("scann", 6000)])
def test_many_vectors_are_searched_to_the_recall_that_is_asked_for(tmp_path, monkeypatch, backend, most):
    monkeypatch.setattr(searching, "EXACT", most)
    vectors_NxD, queries_QxD = made_vectors(40)
    settings = {"backend": backend, "recall": 0.9, "training_sample": 6000}
    mesh = make_mesh(devices=jax.devices()[:1])
    index = searching.open_index(
        searching.source_of(vectors_NxD), settings, 5, mesh, epath.Path(tmp_path) / "index", queries_QxD
    )
    ids_QxK = index.search(queries_QxD, 5)[1]
    expected = np.argsort(((queries_QxD[:, None] - vectors_NxD) ** 2).sum(-1), axis=1)[:, :5].astype(np.int32)
    assert contains(ids_QxK, expected).mean() >= 0.9
    if (backend, most) != ("scann", 5000):
        np.testing.assert_array_equal(ids_QxK, expected)


@pytest.mark.parametrize("backend", ["scann", "exact"])
def test_many_vectors_are_searched_in_fewer_dimensions(tmp_path, monkeypatch, backend):
    monkeypatch.setattr(searching, "EXACT", 5000)
    vectors_NxD, queries_QxD = (vectors * 0.7 ** np.arange(16) for vectors in made_vectors(40))
    vectors_NxD = vectors_NxD.astype(np.float32)
    settings = {"backend": backend, "recall": 0.9, "training_sample": 6000, "search_dimensions": 8}
    mesh, stored = make_mesh(devices=jax.devices()[:1]), epath.Path(tmp_path) / "index"
    index = searching.open_index(searching.source_of(vectors_NxD), settings, 5, mesh, stored, queries_QxD)
    distances_QxK, ids_QxK = index.search(queries_QxD, 5)
    true_QxN = ((queries_QxD[:, None] - vectors_NxD) ** 2).sum(-1)
    assert contains(ids_QxK, np.argsort(true_QxN, axis=1)[:, :5].astype(np.int32)).mean() >= 0.9
    np.testing.assert_allclose(distances_QxK, np.take_along_axis(true_QxN, ids_QxK, 1), rtol=1e-4)
    if backend == "scann":
        assert np.load(tmp_path / "index" / "index" / "dataset.npy", mmap_mode="r").shape[1] == 8


@pytest.mark.parametrize("sooner", ["exact", "index"])
def test_single_queries_are_timed_with_the_search_that_answers_sooner(tmp_path, monkeypatch, sooner):
    vectors_NxD, queries_QxD = made_vectors(40)

    def seconds(index, k, queries_QxD):
        is_exact = index._effort is None
        index.search(queries_QxD[:1], k)
        return 1.0 if is_exact == (sooner == "exact") else 2.0

    monkeypatch.setattr(searching, "_seconds_per_query", seconds)
    settings = {"backend": "scann", "recall": 0.9, "training_sample": 6000}
    source, mesh = searching.source_of(vectors_NxD), make_mesh(devices=jax.devices()[:1])
    index = searching.open_fastest(source, settings, 5, mesh, epath.Path(tmp_path) / "index", queries_QxD)
    assert (index._effort is None) == (sooner == "exact")


@pytest.mark.parametrize("backend", ["scann", "exact"])
def test_a_large_datastore_is_searched_as_targets_are_made(tmp_path, monkeypatch, backend):
    monkeypatch.setattr(searching, "EXACT", 5000)
    vectors_NxD, queries_QxD = made_vectors(40)
    none_60x100 = np.zeros((60, 100), np.int32)
    keys_60x100xD = vectors_NxD.reshape(60, 100, 16).astype(np.float16)
    arrays = {"keys": keys_60x100xD, "next_tokens": none_60x100, "documents": none_60x100}
    datastore = write_datastore(epath.Path(tmp_path) / "datastore", arrays)
    settings = {"backend": backend, "recall": 0.9, "training_sample": 6000, "k": 5, "search_dimensions": 0}
    mesh = make_mesh(devices=jax.devices()[:1])
    index = searching.open_key_index(datastore, settings, mesh, epath.Path(tmp_path) / "index")
    expected = np.argsort(((queries_QxD[:, None] - vectors_NxD) ** 2).sum(-1), axis=1)[:, :5].astype(np.int32)
    assert contains(index.search(queries_QxD, 5)[1], expected).mean() >= 0.85
