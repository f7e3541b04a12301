import bz2
import gzip
import json
import lzma
import os
import random

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from configs import default
from mlpmem_jax.core import storage
from mlpmem_jax.core.errors import UserError
from mlpmem_jax.corpus import articles, files
from mlpmem_jax.corpus.documents import Document
from mlpmem_jax.corpus.rows import RowReader

COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
TEXTS = ["The first document.\nTwo lines.", "Zweites Dokument, größer.", "第三の文書"]


def corpus_of(path, **changes):
    corpus = default.get_config().corpus
    corpus.source, corpus.path = "files", str(path)
    corpus.update(changes)
    return corpus


def documents_of(path, **changes) -> list[Document]:
    return [document for part in files.open_source(corpus_of(path, **changes)).parts() for document in part.read()]


def read_all(path, **changes) -> list[str]:
    return [text for text, _ in documents_of(path, **changes) if text.strip()]


def parquet_bytes(rows) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(rows if isinstance(rows, pyarrow.Table) else pyarrow.table(rows), sink)
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


@pytest.mark.parametrize("compression", [".gz", ".zst", ".bz2", ".xz"])
def test_several_frames_are_one_text(tmp_path, compression):
    compress = COMPRESS[compression]
    padding = bytes(8) if compression == ".xz" else b""
    content = compress(b"one ") + compress(b"") + padding + compress(b"two") + padding
    (tmp_path / f"a.txt{compression}").write_bytes(content)
    assert read_all(tmp_path) == ["one two"]


def test_pipes_are_left_out(tmp_path):
    """Opening one would wait for whoever writes to it."""
    (tmp_path / "a.txt").write_text("one")
    os.mkfifo(tmp_path / "b.txt")
    source = files.open_source(corpus_of(tmp_path))
    assert [text for part in source.parts() for text, _ in part.read()] == ["one"]
    assert "pipes and devices: 1 (b.txt)" in source.notes[0]
    with pytest.raises(UserError, match=r"b\.txt is not, and does not contain, a readable file"):
        files.open_source(corpus_of(tmp_path / "b.txt"))
    assert files.origin(epath.Path(tmp_path)) == files.origin(epath.Path(tmp_path))


def test_parquet_that_arrow_does_not_implement_is_named(tmp_path, monkeypatch):
    def refused(*arguments, **options):
        raise pyarrow.lib.ArrowNotImplementedError("Nested data conversions not implemented")

    (tmp_path / "a.parquet").write_bytes(content_of("parquet"))
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", refused)
    with pytest.raises(UserError, match=r"a\.parquet: could not be read: Nested data conversions not implemented"):
        read_all(tmp_path)


def test_a_stray_nul_is_text(tmp_path):
    (tmp_path / "a.txt").write_text("some\0text\n\0\n")
    assert read_all(tmp_path) == ["some\0text\n\0\n"]


@given(
    st.lists(st.sampled_from(["word word", "ü", " ", "", "x" * 40]), max_size=60),
    st.integers(min_value=1, max_value=100),
)
def test_chunks_lose_nothing_and_keep_to_the_size(rows, document_bytes):
    lines = [row + "\n" for row in rows]
    chunks = list(articles.chunk_lines(lines, document_bytes))
    text, longest = "".join(lines), max((len(line.encode()) for line in lines), default=0)
    assert "".join(chunks) == text
    assert all(len(document.encode()) < 4 * document_bytes + longest for document in chunks)
    # Every chunk but the forced ones ends at a blank line, and none ends early.
    for document in chunks[:-1]:
        size = len(document.encode())
        assert size >= 4 * document_bytes or (size >= document_bytes and not document.splitlines()[-1].strip())


def test_lines_of_spaces_are_blank(tmp_path):
    paragraphs = [f" Paragraph {index} of an article . \n \n" for index in range(20)]
    (tmp_path / "wiki.txt").write_text("".join(paragraphs))
    assert read_all(tmp_path, document_bytes=30) == paragraphs


def test_a_file_without_line_ends_is_several_documents(tmp_path):
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
        ("wide.txt", "Ünïcode\nplain text\n".encode("utf-16"), ["UTF-8", "0xff"]),
        ("wide.txt", "plain text\nof a file\n".encode("utf-16-le"), ["UTF-8", "NUL", "line 1"]),
        ("second.txt.bz2", bz2.compress(b"one ") + b"BZh9" + bz2.compress(b"two")[8:], ["could not be read"]),
        ("second.txt.xz", lzma.compress(b"one ") + b"x" + lzma.compress(b"two"), ["could not be read"]),
        ("cut.txt.bz2", bz2.compress(b"one ") + bz2.compress(b"two")[:-4], ["ended before"]),
        ("second.txt.gz", gzip.compress(b"one ", mtime=0) + b"x", ["could not be read"]),
        ("bad.jsonl", b'{"text": "fine"}\n{"text": \n', ["line 2", "not valid JSON"]),
        ("key.jsonl", b'{"body": "fine"}\n', ["line 1", "'text'", "body", "config.corpus.text_key"]),
        ("list.jsonl", b"[1, 2]\n", ["line 1", "list"]),
        ("bad.parquet", b"PAR1 but no more", ["could not be read"]),
    ],
)
def test_damaged_input_names_the_file(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_all(tmp_path)
    assert all(word in str(error.value) for word in [str(tmp_path / name), *words])


def test_a_parquet_file_without_the_column_names_it(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet_bytes({"body": ["x"], "text": [1]}))
    with pytest.raises(UserError, match=r"a\.parquet: row 1: expected text at 'text', found a int"):
        read_all(tmp_path)


def test_nothing_to_read(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        files.open_source(corpus_of(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"does not contain, a readable file; expected \.txt"):
        files.open_source(corpus_of(tmp_path))
    (tmp_path / "notes.doc").write_text("x")
    with pytest.raises(UserError, match="does not contain, a readable file"):
        files.open_source(corpus_of(tmp_path / "notes.doc"))


def test_a_long_text_file_is_one_group_of_documents(tmp_path):
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text("".join(f"{name}, paragraph {index}.\n\n" for index in range(20)))
    actual = documents_of(tmp_path, document_bytes=40)
    assert len(actual) == 20
    assert [group for _, group in actual] == ["one.txt"] * 10 + ["two.txt"] * 10
    assert all(text.startswith(group) for text, group in actual)


WIKITEXT = [
    " \n = Homarus gammarus = \n \n A lobster . \n A voltage \n = 1 V and C = \n 1 F . \n \n"
    " = = Description = = \n \n Large . \n",
    " \n = M @-@ 82 ( Michigan highway ) = \n \n A road . \n",
    " \n = X = \n \n = = = Deep = = = \n \n Short . \n",
]


def test_articles_of_wikitext_are_documents_however_long(tmp_path):
    (tmp_path / "wiki.txt").write_text("".join(WIKITEXT))
    actual = documents_of(tmp_path, articles="wikitext", document_bytes=10)
    # The blank line before a title is the last of the article before it.
    assert ["".join(text.split()) for text, _ in actual] == ["".join(text.split()) for text in WIKITEXT]
    assert "".join(text for text, _ in actual) == "".join(WIKITEXT)
    assert {group for _, group in actual} == {""}
    (tmp_path / "wiki.txt").write_text("= = No article = =\n\nText.\n")
    with pytest.raises(UserError, match=r"wiki\.txt: config\.corpus\.articles='wikitext' expects titles"):
        documents_of(tmp_path, articles="wikitext")


def test_splits_by_name_are_kept(tmp_path):
    names = ["Train-00.txt", "train-01.txt", "valid.txt", "dev/0.txt", "testing/0.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    actual = {part.name: part.split for part in files.open_source(corpus_of(tmp_path, split_by_name=True)).parts()}
    splits = ["train", "train", "validation", "validation", "test"]
    assert actual == {str(tmp_path / name): split for name, split in zip(names, splits, strict=True)}
    assert {part.split for part in files.open_source(corpus_of(tmp_path)).parts()} == {""}
    (tmp_path / "other.txt").write_text("x")
    with pytest.raises(UserError, match=r"split_by_name: expected file names.* train, .*found 'other\.txt'"):
        files.open_source(corpus_of(tmp_path, split_by_name=True))


NESTED = [
    {"data": {"text": "one"}, "ctxs": [{"title": "A", "text": "first"}, {"title": "B", "text": "other"}]},
    {"data": {"text": "two"}, "ctxs": [{"title": None, "text": "second"}]},
    {"data": {"text": None}, "ctxs": []},
    {"data": None, "ctxs": None},
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("text_key", "texts"),
    [
        ("data.text", ["one", "two"]),
        ("ctxs.0.text", ["first", "second"]),
        ("ctxs.0.title+ctxs.0.text", ["A\nfirst", "second"]),
        ("data.text+ctxs.1.title", ["one\nB", "two"]),
    ],
)
def test_nested_and_joined_fields(tmp_path, kind, text_key, texts):
    if kind == "parquet":
        content = parquet_bytes(pyarrow.Table.from_pylist(NESTED))
    else:
        content = "".join(json.dumps(row) + "\n" for row in NESTED).encode()
    (tmp_path / f"rows.{kind}").write_bytes(content)
    assert [text for text, _ in documents_of(tmp_path, text_key=text_key)] == [*texts, *[""] * (4 - len(texts))]


@pytest.mark.parametrize("key", ["data.body", "data.text.more", "ctxs.first.text", "absent.text", "ctxs"])
def test_a_field_that_is_not_there_is_named(tmp_path, key):
    (tmp_path / "rows.jsonl").write_text(json.dumps(NESTED[0]) + "\n")
    with pytest.raises(UserError, match=rf"line 1: .*'{key}'.*config\.corpus\.text_key"):
        documents_of(tmp_path, text_key=key)


def test_keys_with_dots_and_signs_are_fields_too(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"a.b": "dot", "a+b": "plus", "a": {"b": "nested"}}))
    assert read_all(tmp_path, text_key="a.b") == ["dot"]
    assert read_all(tmp_path, text_key="a+b") == ["plus"]


def test_groups_of_rows(tmp_path):
    rows = [{"text": f"{i}", "source": "s", "path": f"book{i // 2}#{i:04d}", "n": i % 2} for i in range(4)]
    rows.append({"text": "4", "source": "s", "path": None, "n": None})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def groups(**changes):
        return [group for _, group in documents_of(tmp_path, **changes)]

    assert groups() == [""] * 5
    assert groups(group_key="path") == ["book0", "book0", "book1", "book1", ""]
    assert groups(group_key="path", group_part="") == ["book0#0000", "book0#0001", "book1#0002", "book1#0003", ""]
    assert groups(group_key="path", group_part=r"\d#.*") == ["book"] * 4 + [""]
    assert groups(group_key="n") == ["0", "1", "0", "1", ""]
    first, second, third, *_ = groups(group_key="source+path")
    assert first == second != third
    assert {"s", "book0"} < set(first.split("\0")) | {""}
    with pytest.raises(UserError, match=r"has no field 'book'.*config\.corpus\.group_key"):
        groups(group_key="book")


def test_json_files_hold_lines_or_one_array(tmp_path):
    rows = [{"text": text} for text in TEXTS]
    for name, content in (
        ("lines.json", "\n".join(map(json.dumps, rows))),
        ("array.json", json.dumps(rows)),
        ("pretty.json", json.dumps(rows, indent=2)),
        ("LINES.JSON.gz", "\n".join(map(json.dumps, rows))),
    ):
        path = tmp_path / name
        path.write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
        assert read_all(path) == TEXTS, name
    (tmp_path / "object.json").write_text(json.dumps(rows[0], indent=2))
    assert read_all(tmp_path / "object.json") == TEXTS[:1]
    (tmp_path / "other.json").write_text('{"text":\n"x"')
    with pytest.raises(UserError, match=r"other\.json is not valid JSON"):
        read_all(tmp_path / "other.json")


def test_what_is_left_out_is_named_and_counted(tmp_path):
    for name in ("a.txt", "B.TXT", "c.Md", "picture.png", "README", "d.txt.zip", ".hidden.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {}}, indent=2))
    (tmp_path / "infos.json").write_text(json.dumps({"splits": []}))
    (tmp_path / "e.json").write_text(json.dumps({"text": "e.json"}))
    (tmp_path / "nowhere.txt").symlink_to("absent.txt")
    source = files.open_source(corpus_of(tmp_path))
    assert [text for part in source.parts() for text, _ in part.read()] == ["B.TXT", "a.txt", "c.Md", "e.json"]
    assert len(source.notes) == 1
    assert source.notes[0].endswith(": 6 (README, d.txt.zip, infos.json, nowhere.txt, picture.png, ...)")
    with pytest.raises(UserError, match="no field 'text'"):  # asked for by name, it is not left out
        read_all(tmp_path / "infos.json")


def test_names_that_end_in_a_tilde_are_names(tmp_path):
    for name in ("a.txt", "PROGRA~/b.txt", "c.txt~"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    source = files.open_source(corpus_of(tmp_path))
    assert [text for part in source.parts() for text, _ in part.read()] == ["PROGRA~/b.txt", "a.txt"]
    assert source.notes[0].endswith(": 1 (c.txt~)")


def test_links_are_followed_and_every_file_is_read_once(tmp_path):
    corpus = tmp_path / "corpus"
    (corpus / "folder").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "o.txt").write_text("outside")
    (corpus / "a.txt").write_text("inside")
    (corpus / "folder" / "b.txt").write_text("below")
    for place in (corpus, corpus / "folder"):
        (place / "self").symlink_to(".")
        (place / "up").symlink_to("..")
        (place / "copy.txt").symlink_to(corpus / "a.txt")
        (place / "linked").symlink_to(tmp_path / "outside")
    assert sorted(read_all(corpus)) == ["below", "inside", "outside"]


def test_names_with_any_bytes_and_glob_characters(tmp_path):
    folder = tmp_path / "x[y]*"
    folder.mkdir()
    (folder / "[a]?.txt").write_text("one")
    with open(os.fsencode(folder) + b"/caf\xe9.txt", "w") as file:
        file.write("two")
    with open(os.fsencode(folder) + b"/caf\xe9.bin", "w") as file:
        file.write("?")
    source = files.open_source(corpus_of(folder))
    assert [part.name for part in source.parts()] == [str(folder / "[a]?.txt"), f"{folder}/caf\\xe9.txt"]
    assert [text for part in source.parts() for text, _ in part.read()] == ["one", "two"]
    assert source.notes[0].endswith(r"1 (caf\xe9.bin)")
    for part in source.parts():
        part.name.encode()


def test_a_change_of_equal_size_changes_the_inputs(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one")
    before = files.open_source(corpus_of(tmp_path)).inputs
    (tmp_path / "a.txt").write_text("two")
    assert files.open_source(corpus_of(tmp_path)).inputs != before
    (tmp_path / "a.txt").write_text("one")
    os.utime(tmp_path / "a.txt", (1, 1))  # the time alone is no change
    assert files.open_source(corpus_of(tmp_path)).inputs == before
    monkeypatch.setattr(storage, "_HASHED_BYTES", 2)
    before = files.open_source(corpus_of(tmp_path)).inputs
    (tmp_path / "a.txt").write_text("two")
    assert files.open_source(corpus_of(tmp_path)).inputs != before


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "locked").mkdir()
    listdir = os.listdir

    def refused(path):
        if os.path.basename(path) == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refused)
    with pytest.raises(UserError, match=r"config\.corpus\.path: .*locked cannot be read: Permission denied"):
        files.open_source(corpus_of(tmp_path))


def test_a_zstd_window_of_any_size_is_read(tmp_path):
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.txt.zst").write_bytes(stream.compress(b"text " * 1000) + stream.flush())
    assert "".join(read_all(tmp_path)) == "text " * 1000


def test_json_that_is_nested_too_deeply_is_named(tmp_path):
    (tmp_path / "deep.jsonl").write_text(
        '{"text": "x"}\n{"text": "x", "meta": ' + "[" * 100_000 + "]" * 100_000 + "}\n"
    )
    with pytest.raises(UserError, match=r"deep\.jsonl: line 2 nests"):
        read_all(tmp_path)


def test_kinds_of_parquet_text(tmp_path):
    array = pyarrow.array([*TEXTS, None])
    for index, column in enumerate((array.dictionary_encode(), array.cast("large_string"), array.cast("string_view"))):
        (tmp_path / f"{index}.parquet").write_bytes(parquet_bytes({"text": column}))
    assert read_all(tmp_path) == TEXTS * 3
    twice = pyarrow.Table.from_arrays([array, array], names=["text", "text"])
    (tmp_path / "twice.parquet").write_bytes(parquet_bytes(twice))
    with pytest.raises(UserError, match=r"twice\.parquet: expected one column 'text', found text \(string\), text"):
        read_all(tmp_path)


def test_epath_names_are_accepted(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    assert list(files.read_documents(epath.Path(tmp_path / "a.txt"), "a.txt", RowReader("text"), "", 100)) == [
        Document("one", "a.txt")
    ]
