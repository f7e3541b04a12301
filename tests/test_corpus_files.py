import gzip
import json
import random

import pytest
import zstandard
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from configs import default
from mlpmem_jax.core.errors import UserError
from mlpmem_jax.corpus import files

COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
TEXTS = ["The first document.\nTwo lines.", "Zweites Dokument, größer.", "第三の文書"]


def corpus_of(path, **changes):
    corpus = default.get_config().corpus
    corpus.source, corpus.path = "files", str(path)
    corpus.update(changes)
    return corpus


def read_all(path, **changes):
    return [text for part in files.open_source(corpus_of(path, **changes)).parts() for text in part.read()]


def parquet_bytes(rows: dict) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table(rows), sink)
    return sink.getvalue().to_pybytes()


def content_of(kind: str) -> bytes:
    if kind == "parquet":
        return parquet_bytes({"other": [1, 2, 3, 4], "text": [*TEXTS, None]})
    return "\n".join([*(json.dumps({"text": text, "n": 1}) for text in TEXTS), ""]).encode()


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_are_documents(tmp_path, kind, compression):
    (tmp_path / f"rows.{kind}{compression}").write_bytes(COMPRESS[compression](content_of(kind)))
    assert read_all(tmp_path) == TEXTS


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_short_text_file_is_one_document(tmp_path, compression):
    for index, text in enumerate(TEXTS):
        (tmp_path / f"{index}.txt{compression}").write_bytes(COMPRESS[compression](text.encode()))
    assert read_all(tmp_path) == TEXTS


def test_folders_are_read_in_the_order_of_relative_paths(tmp_path):
    names = ["b/1.txt", "a/z.md", "a/deep/er.rst", "c.txt", ".hidden/x.txt", "picture.png", ".dot.txt", "README"]
    random.Random(0).shuffle(names)
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read_all(tmp_path) == ["a/deep/er.rst", "a/z.md", "b/1.txt", "c.txt"]


def test_several_zstd_frames_are_one_text(tmp_path):
    (tmp_path / "a.txt.zst").write_bytes(
        zstandard.compress(b"one ") + zstandard.compress(b"") + zstandard.compress(b"two")
    )
    assert read_all(tmp_path) == ["one two"]


@given(
    st.lists(st.sampled_from(["word word", "ü", " ", "", "x" * 40]), max_size=60),
    st.integers(min_value=1, max_value=100),
)
def test_cutting_loses_nothing_and_keeps_to_the_size(rows, document_bytes):
    lines = [row + "\n" for row in rows]
    cut = list(files.cut_documents(lines, document_bytes))
    text, longest = "".join(lines), max((len(line.encode()) for line in lines), default=0)
    assert "".join("".join(cut).split()) == "".join(text.split())
    assert all(document in text and document.strip() for document in cut)
    assert all(len(document.encode()) < 4 * document_bytes + longest for document in cut)
    # Every cut but the forced ones is at a blank line, and none comes early.
    for document in cut[:-1]:
        size = len(document.encode())
        assert size >= 4 * document_bytes or (size >= document_bytes and not document.splitlines()[-1].strip())


def test_lines_of_spaces_are_blank(tmp_path):
    paragraphs = [f" Paragraph {index} of an article . \n \n" for index in range(20)]
    (tmp_path / "wiki.txt").write_text("".join(paragraphs))
    assert read_all(tmp_path, document_bytes=30) == paragraphs


def test_a_file_without_line_ends_is_cut(tmp_path):
    (tmp_path / "one_line.txt").write_text("abc " * 1000)
    documents = read_all(tmp_path, document_bytes=100)
    assert len(documents) == 10
    assert "".join(documents) == "abc " * 1000


def test_the_inputs_change_with_the_files(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    before = files.open_source(corpus_of(tmp_path)).inputs
    assert files.open_source(corpus_of(tmp_path)).inputs == before
    (tmp_path / "b.txt").write_text("two")
    assert files.open_source(corpus_of(tmp_path)).inputs != before


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("latin.txt", "größer".encode("latin-1"), ["UTF-8", "0xf6"]),
        ("cut.txt.gz", gzip.compress(b"text " * 9999, mtime=0)[:-20], ["could not be read"]),
        ("not.txt.gz", b"not compressed", ["could not be read"]),
        ("cut.txt.zst", zstandard.compress(random.Random(0).randbytes(500_000).hex().encode())[:-99], ["ended before"]),
        ("not.txt.zst", b"not compressed", ["could not be read"]),
        ("bad.jsonl", b'{"text": "fine"}\n{"text": \n', ["line 2", "not valid JSON"]),
        ("key.jsonl", b'{"body": "fine"}\n', ["line 1", "'text'", "body", "config.corpus.text_key"]),
        ("list.jsonl", b"[1, 2]\n", ["line 1", "list"]),
        ("bad.parquet", b"PAR1 but no more", ["could not be read"]),
    ],
)
def test_damaged_input_names_the_file(tmp_path, name, content, words):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_all(tmp_path)
    assert all(word in str(error.value) for word in [str(tmp_path / name), *words])


def test_a_parquet_file_without_the_column_names_it(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet_bytes({"body": ["x"], "text": [1]}))
    with pytest.raises(UserError, match=r"a\.parquet: has no text column 'text', found body \(string\), text"):
        read_all(tmp_path)


def test_nothing_to_read(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        files.open_source(corpus_of(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"no file that can be read; expected \.txt"):
        files.open_source(corpus_of(tmp_path))
    (tmp_path / "notes.doc").write_text("x")
    with pytest.raises(UserError, match="no file that can be read"):
        files.open_source(corpus_of(tmp_path / "notes.doc"))


def test_epath_names_are_accepted(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    assert list(files.read_documents(epath.Path(tmp_path / "a.txt"), "text", 100)) == ["one"]
