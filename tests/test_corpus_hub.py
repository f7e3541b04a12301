import json

import pytest

from configs import default
from mlpmem_jax.core import errors
from mlpmem_jax.core.errors import UserError
from mlpmem_jax.corpus import hub


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    import datasets  # slow to import

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    return datasets


def write(folder, **splits):
    folder.mkdir()
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return folder


def parts_of(folder, **changes):
    corpus = default.get_config().corpus
    corpus.source, corpus.name = "hub", str(folder)
    corpus.update(changes)
    return {part.split: [text for text, _ in part.read() if text] for part in hub.open_source(corpus).parts()}


def test_rows_are_documents_with_the_splits_of_the_data_set(tmp_path, datasets):
    code = ["three\n\nlines\n", "two\nlines\n"]
    folder = write(tmp_path / "set", train=["one\nline", "", "two\n"], test=code)
    assert parts_of(folder) == {"train": ["one\nline", "two\n"], "test": code}


def test_rows_that_are_lines_are_joined_to_documents(tmp_path, datasets):
    rows = ["", " = Title = \n", "", " A paragraph of text . \n", " Another one . \n", "", " = Next = \n"]
    folder = write(tmp_path / "set", train=rows, validation=rows)
    expected = [" = Title = \n A paragraph of text . \n Another one . \n", " = Next = \n"]
    assert parts_of(folder, document_bytes=30)["train"] == expected
    assert parts_of(folder, document_bytes=1000)["validation"] == ["".join(rows)]


def test_what_cannot_be_loaded_is_named(tmp_path, datasets):
    with pytest.raises(UserError, match=r"config\.corpus\.name: the data set '.*absent'"):
        parts_of(tmp_path / "absent")
    with pytest.raises(UserError, match=r"config\.corpus\.text_key, group_key: .* has no column 'body'.*\['text'\]"):
        parts_of(write(tmp_path / "set", train=["one"]), text_key="body")
    with pytest.raises(UserError, match="has no split 'train'"):
        parts_of(write(tmp_path / "other", test=["one"]))


def test_a_revision_is_asked_for_and_recorded(tmp_path, datasets, monkeypatch):
    folder, asked = write(tmp_path / "set", train=["one"]), []
    load = datasets.load_dataset_builder

    def from_hub(name, subset, revision=None):
        asked.append((name, revision))
        return load(str(folder), subset)

    monkeypatch.setattr(datasets, "load_dataset_builder", from_hub)
    corpus = default.get_config().corpus
    corpus.update({"source": "hub", "name": "owner/one@v2,owner/two"})
    parts = hub.open_source(corpus).parts()
    assert asked == [("owner/one", "v2"), ("owner/two", None)]
    assert {part.revision for part in parts} == {load(str(folder)).hash}


def test_changes_of_a_local_folder_change_the_inputs(tmp_path, datasets):
    corpus = default.get_config().corpus
    corpus.update({"source": "hub", "name": str(write(tmp_path / "set", train=["one"]))})
    before = hub.open_source(corpus).inputs
    assert hub.open_source(corpus).inputs == before
    (tmp_path / "set" / "train.jsonl").write_text(json.dumps({"text": "two"}) + "\n")
    assert hub.open_source(corpus).inputs != before


def test_without_the_extra(monkeypatch):
    def missing(module):
        raise ImportError(f"No module named {module!r}")

    monkeypatch.setattr(errors.importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"mlpmem_jax\[hub\]"):
        hub.open_source(default.get_config().corpus)


def test_several_sets_are_mixed_and_keep_their_splits(tmp_path, datasets):
    one = write(tmp_path / "one", train=["first\n\nrow", "second\n\nrow"], test=["third\n\nrow"])
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "train.jsonl").write_text(json.dumps({"content": "another\n\ntext"}) + "\n")
    corpus = default.get_config().corpus
    corpus.update({"source": "hub", "name": f"{one},{tmp_path / 'two'}", "text_key": "text,content"})
    parts = hub.open_source(corpus).parts()
    assert [(part.data_set, part.split) for part in parts] == [
        (str(one), "train"), (str(one), "test"), (str(tmp_path / "two"), "train"),
    ]  # fmt: skip
    texts = [text for part in parts for text, _ in part.read()]
    assert texts == ["first\n\nrow", "second\n\nrow", "third\n\nrow", "another\n\ntext"]
    corpus.text_key = "text,content,body"
    with pytest.raises(UserError, match=r"config\.corpus\.text_key: expected 2 entries.*found 3"):
        hub.open_source(corpus)
    corpus.text_key = "text"
    with pytest.raises(UserError, match=r"two' has no column 'text'"):
        hub.open_source(corpus).parts()


def test_articles_of_wikitext_rows_and_groups_of_others(tmp_path, datasets):
    rows = [
        "",
        " = One = \n",
        "",
        " A line . \n",
        " = = Part = = \n",
        "",
        " More . \n",
        "",
        " = Two = \n",
        "",
        " End . \n",
    ]
    folder = write(tmp_path / "wiki", train=rows)
    (tmp_path / "books").mkdir()
    pieces = [{"text": f"piece\n\n{index}", "path": f"book {index // 3}#{index:04d}"} for index in range(6)]
    (tmp_path / "books" / "train.jsonl").write_text("".join(json.dumps(piece) + "\n" for piece in pieces))
    corpus = default.get_config().corpus
    corpus.update({"source": "hub", "name": f"{folder},{tmp_path / 'books'}"})
    corpus.update({"articles": "wikitext,", "group_key": ",path"})
    wiki, books = (list(part.read()) for part in hub.open_source(corpus).parts())
    assert [text for text, _ in wiki] == ["".join(rows[:8]), "".join(rows[8:])]
    assert {group for _, group in wiki} == {""}
    assert [group for _, group in books] == ["book 0"] * 3 + ["book 1"] * 3
