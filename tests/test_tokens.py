import concurrent.futures
import itertools
import os
import pathlib
import random
import re
import threading
import time
import types
import unicodedata

import numpy as np
import pytest
import tokenizers
from workdirs import bytes_by_file

from configs import default
from mlpmem_jax.core import storage
from mlpmem_jax.core.errors import ArtifactError, UserError
from mlpmem_jax.corpus import documents, tokenizer, tokens
from mlpmem_jax.corpus.documents import SPLITS

CONTEXT = 16


def write_corpus(folder: pathlib.Path) -> list[str]:
    generator = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "naïve", "<|endoftext|>", "\n\n", "x = 1"]
    texts = [" ".join(generator.choices(words, k=generator.randrange(1, 60))) + f" {index}" for index in range(60)]
    folder.mkdir()
    for index, text in enumerate(texts):
        (folder / f"{index:03d}.txt").write_text(text)
    return texts


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A config over a folder of small documents that makes about eight shards, and the documents."""
    monkeypatch.setattr(documents, "SHARD_BYTES", 1500)
    monkeypatch.setattr(tokens, "_BATCH_BYTES", 400)
    texts = write_corpus(tmp_path / "text")
    config = default.get_config()
    config.workdir = str(tmp_path / "work")
    config.corpus.update(
        {"source": "files", "path": str(tmp_path / "text"), "validation_fraction": 0.2, "test_fraction": 0.2}
    )
    config.tokenizer.vocab_size = 280
    config.base.context_length = CONTEXT
    return config, texts


def reference_documents(artifact, split) -> list[str]:
    """The documents of a split, taken from the raw arrays and cut at their lengths by a plain loop."""
    encoder = tokenizer.from_bytes(artifact.read_file("tokenizer.json"), "test")
    begin, end, texts = tokenizer.begin_ids(encoder), artifact.summary["end_of_text_id"], []
    for shard in range(artifact.num_shards):
        ids, start = artifact.read_ragged(split, shard).tolist(), 0
        for length in artifact.read_ragged(f"{split}_lengths", shard).tolist():
            document = ids[start : start + length]
            assert document[: len(begin)] == begin
            assert document[-1] == end
            assert end not in document[:-1]
            texts.append(encoder.decode(document[len(begin) : -1], skip_special_tokens=False))
            start += length
        assert start == len(ids)
    return texts


def test_the_streams_hold_every_document_once_in_its_split(corpus):
    config, texts = corpus
    artifact = tokens.run(config)
    assert artifact.num_shards > 4
    actual = {split: reference_documents(artifact, split) for split in SPLITS}
    assert sorted(itertools.chain(*actual.values())) == sorted(texts)
    assert all(actual.values())
    for split in SPLITS:
        others = {text for other in SPLITS if other != split for text in actual[other]}
        assert not others & set(actual[split])
        assert actual[split] == [text for text in texts if text in actual[split]]  # the order of the corpus
        assert artifact.summary["documents"][split] == len(actual[split])
        assert artifact.summary["bytes"][split] == sum(len(text.encode()) for text in actual[split])
    assert artifact.summary["vocab_size"] == 280


def test_documents_begin_with_what_the_tokenizer_puts_before_a_text(corpus, tmp_path):
    config, texts = corpus
    built = tokenizer.train(iter(texts), 280)
    built.normalizer = tokenizers.normalizers.NFKC()
    built.add_special_tokens(["<s>", "[PAD]"])
    built.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 280)])
    built.save(str(tmp_path / "tokenizer.json"))
    config.tokenizer.update({"source": "file", "path": str(tmp_path)})
    (tmp_path / "text" / "grows.txt").write_text("\ufdfa" * 400)  # one character becomes eighteen
    artifact = tokens.run(config)
    actual = [text for split in SPLITS for text in reference_documents(artifact, split)]
    assert sorted(actual) == sorted(unicodedata.normalize("NFKC", text) for text in [*texts, "\ufdfa" * 400])
    assert artifact.summary["vocab_size"] == 281
    ids = built.encode("gamma", add_special_tokens=False).ids
    assert tokens.encode_prompts(artifact, ["gamma", ""]) == [[280, *ids], [280]]


def test_readers_agree_with_the_concatenated_documents(corpus):
    config, _ = corpus
    artifact = tokens.run(config)
    encoder = tokens.read_tokenizer(artifact)
    end = artifact.summary["end_of_text_id"]
    stream = tokens.TokenStream(artifact, "train")
    flat, owner = [], []
    for document, text in enumerate(reference_documents(artifact, "train")):
        ids = [*encoder.encode(text).ids, end]
        flat += ids
        owner += [document] * len(ids)
    assert stream.length == len(flat)
    generator = random.Random(1)
    spans = [(0, 0), (0, len(flat)), (len(flat), len(flat)), *([s, s + 1] for s in range(0, len(flat), 97))]
    spans += [sorted(generator.choices(range(len(flat) + 1), k=2)) for _ in range(30)]
    for start, stop in spans:
        np.testing.assert_array_equal(stream.read(start, stop), flat[start:stop])
        np.testing.assert_array_equal(stream.document_ids(start, stop), owner[start:stop])
    assert stream.read(0, 5).dtype == stream.document_ids(0, 5).dtype == np.int32
    for span in ((-1, 3), (3, 2), (0, len(flat) + 1)):
        with pytest.raises(ValueError, match="not within a stream of"):
            stream.read(*span)


def test_every_token_but_the_first_is_a_target_once(corpus):
    config, _ = corpus
    stream = tokens.TokenStream(tokens.run(config), "train")
    flat = stream.read(0, stream.length)
    count = tokens.num_sequences(stream, CONTEXT)
    assert count * CONTEXT + 1 <= stream.length < (count + 1) * CONTEXT + 1
    inputs, next_tokens, owners = tokens.read_sequences(stream, 0, count, CONTEXT)
    assert inputs.shape == next_tokens.shape == owners.shape == (count, CONTEXT)
    np.testing.assert_array_equal(inputs.ravel(), flat[: count * CONTEXT])
    np.testing.assert_array_equal(next_tokens.ravel(), flat[1 : count * CONTEXT + 1])
    for first in (0, 3, count - 2):
        some = tokens.read_sequences(stream, first, 2, CONTEXT)
        for part, whole in zip(some, (inputs, next_tokens, owners), strict=True):
            np.testing.assert_array_equal(part, whole[first : first + 2])
            assert part.dtype == np.int32
    with pytest.raises(ValueError, match="not within a stream of"):
        tokens.read_sequences(stream, count, 1, CONTEXT)


@pytest.mark.parametrize(("length", "count"), [(0, 0), (16, 0), (17, 1), (48, 2), (49, 3)])
def test_a_sequence_needs_the_token_after_it(length, count):
    assert tokens.num_sequences(types.SimpleNamespace(length=length), 16) == count


@pytest.mark.parametrize("completed", [0, 1, 3])
def test_a_restarted_stage_ends_with_the_same_bytes(corpus, monkeypatch, completed):
    config, _ = corpus
    whole = tokens.run(config)
    config.workdir += "_restarted"
    write_shard, written = tokens.ArtifactWriter.write_shard, []

    def interrupted(self, index, arrays, extra=None):
        if len(written) == completed:
            raise KeyboardInterrupt
        written.append(index)
        write_shard(self, index, arrays, extra)

    monkeypatch.setattr(tokens.ArtifactWriter, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokens.run(config)
    redone = []
    monkeypatch.setattr(
        tokens.ArtifactWriter, "write_shard", lambda self, i, *rest: (redone.append(i), write_shard(self, i, *rest))
    )
    restarted = tokens.run(config)
    assert sorted(written + redone) == list(range(whole.num_shards))
    assert restarted.fingerprint == whole.fingerprint
    assert bytes_by_file(restarted.path) == bytes_by_file(whole.path)


def test_processes_share_the_shards(corpus, monkeypatch):
    """Three processes, played by threads that meet at the barriers."""
    config, _ = corpus
    alone = tokens.run(config)
    config.workdir += "_shared"
    here, meeting = threading.local(), threading.Barrier(3, timeout=60)
    monkeypatch.setattr(tokens.jax, "process_count", lambda: 3)
    monkeypatch.setattr(tokens.jax, "process_index", lambda: here.process)
    monkeypatch.setattr(tokens.mesh, "barrier", lambda name: meeting.wait())
    written = {0: [], 1: [], 2: []}
    write_shard = tokens.ArtifactWriter.write_shard

    def record(self, index, arrays, extra=None):
        written[here.process].append(index)
        time.sleep(0.05 * here.process)  # the first process must wait for the others before it seals
        write_shard(self, index, arrays, extra)

    monkeypatch.setattr(tokens.ArtifactWriter, "write_shard", record)

    def process(index):
        here.process = index
        return tokens.run(config)

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        shared = list(pool.map(process, range(3)))
    assert all(written.values())
    assert sorted(itertools.chain(*written.values())) == list(range(alone.num_shards))
    assert {artifact.fingerprint for artifact in shared} == {alone.fingerprint}
    assert bytes_by_file(shared[0].path) == bytes_by_file(alone.path)


def test_every_shard_has_a_document_that_is_used(corpus):
    config, _ = corpus
    parts = tokens.open_source(config.corpus).parts()
    for config.corpus.max_bytes in range(1500, 9000, 125):  # used documents may end anywhere in a shard
        partition = documents.make_partition(parts, config.corpus)
        used = set(partition.shard_N[partition.split_N >= 0].tolist())
        assert used == set(range(partition.num_shards)), config.corpus.max_bytes


def test_a_finished_stage_is_not_made_again(corpus, monkeypatch):
    config, _ = corpus
    first = tokens.run(config)
    monkeypatch.setattr(tokens, "_build", None)
    assert tokens.run(config).fingerprint == first.fingerprint


def test_changed_text_is_noticed(corpus):
    config, _ = corpus
    tokens.run(config)
    (pathlib.Path(config.corpus.path) / "more.txt").write_text("more")
    with pytest.raises(ArtifactError, match="files"):
        tokens.run(config)


def test_copies_of_large_files_without_their_times_are_explained(corpus, monkeypatch):
    config, _ = corpus
    monkeypatch.setattr(storage, "_HASHED_BYTES", 0)
    tokens.run(config)
    os.utime(pathlib.Path(config.corpus.path) / "000.txt", (1, 1))
    with pytest.raises(ArtifactError, match=r"Copies of large files need the times of the originals \(cp -p, rsync"):
        tokens.run(config)


def test_text_that_changes_while_it_is_read_is_noticed(corpus, monkeypatch):
    def changing(parts, partition):
        pathlib.Path(config.corpus.path, "000.txt").write_text("other text")
        return {}

    config, _ = corpus
    monkeypatch.setattr(tokens, "_overlap", changing)
    with pytest.raises(UserError, match=r"was changed while it was read; delete .*tokens and run again"):
        tokens.run(config)


def test_a_given_tokenizer_is_used(corpus, tmp_path):
    config, texts = corpus
    tokenizer.train(texts[:5], 270).save(str(tmp_path / "tokenizer.json"))
    config.tokenizer.source, config.tokenizer.path = "file", str(tmp_path / "tokenizer.json")
    artifact = tokens.run(config)
    assert artifact.summary["vocab_size"] == 270
    assert sorted(itertools.chain(*(reference_documents(artifact, split) for split in SPLITS))) == sorted(texts)


def test_splits_shorter_than_a_sequence_are_refused(corpus):
    config, _ = corpus
    config.base.context_length = 100_000
    with pytest.raises(UserError, match=r"the train split has \d+ tokens, expected more than config\.base\.context"):
        tokens.run(config)
    config.base.context_length = CONTEXT
    tokens.run(config)


def test_bad_text_leaves_nothing_behind(corpus):
    config, _ = corpus
    (pathlib.Path(config.corpus.path) / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"bad\.txt: expected UTF-8"):
        tokens.run(config)
    assert not pathlib.Path(config.workdir).exists()


def test_the_documents_of_one_file_are_one_text_to_readers(corpus, tmp_path):
    """A position's document, which neighbors may be excluded by, is the whole file that it is from."""
    config, _ = corpus
    folder = tmp_path / "files"
    folder.mkdir()
    for name in "abcdefgh":
        (folder / f"{name}.txt").write_text("".join(f"file {name}, {index}.\n\n" for index in range(30)))
    config.corpus.update({"path": str(folder), "document_bytes": 100})
    artifact = tokens.run(config)
    assert artifact.num_shards > 1
    sides = {}
    for split in SPLITS:
        names = [text.split(",")[0].strip() for text in reference_documents(artifact, split)]
        stream = tokens.TokenStream(artifact, split)
        ends = stream.document_ends
        ids = stream.document_ids(0, stream.length)
        first = [ids[end - 1] for end in ends]
        assert len(names) > len(set(names))
        assert first == [list(dict.fromkeys(names)).index(name) for name in names]
        for begin, end in itertools.pairwise([0, *ends]):
            assert len(set(ids[begin:end])) == 1
        sides |= dict.fromkeys(names, split)
        assert all(sides[name] == split for name in names)
    assert len(sides) == 8


def test_text_edited_in_place_is_noticed(corpus):
    config, texts = corpus
    tokens.run(config)
    file = pathlib.Path(config.corpus.path) / "003.txt"
    file.write_text(texts[3].replace("3", "4"))
    with pytest.raises(ArtifactError, match="files"):
        tokens.run(config)


def test_a_tokenizer_that_does_not_know_the_text_is_told(corpus, tmp_path, monkeypatch):
    config, texts = corpus
    known = sorted({word for text in texts for word in text.split()})
    for name, vocabulary in (("all", known), ("few", known[:2])):
        model = tokenizers.models.WordLevel(
            {word: place for place, word in enumerate(["</s>", "[UNK]", *vocabulary])}, unk_token="[UNK]"
        )
        built = tokenizers.Tokenizer(model)
        built.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        built.save(str(tmp_path / f"{name}.json"))
        config.tokenizer.update({"source": "file", "path": str(tmp_path / f"{name}.json")})
        config.workdir = str(tmp_path / f"run_{name}")
        said = []
        monkeypatch.setattr(tokens, "say", said.append)
        tokens.run(config)
        told = [line for line in said if "of the tokens of the validation split are '[UNK]'" in line]
        assert len(told) == (name == "few"), said


def test_the_overlap_of_splits_is_measured_and_a_large_one_told(corpus, tmp_path, monkeypatch):
    config, _ = corpus
    folder = tmp_path / "overlapping"
    folder.mkdir()
    shared = " ".join(f"shared{index}" for index in range(20))
    for index in range(30):
        words = " ".join(f"word{index}x{n}" for n in range(80))
        (folder / f"{index}.txt").write_text(f"{words} {shared}")
    config.corpus.path = str(folder)
    said = []
    monkeypatch.setattr(tokens, "say", said.append)
    artifact = tokens.run(config)
    assert artifact.summary["overlap"] == {split: {"13": 0.2, "25": 0.0} for split in ("validation", "test")}
    assert any(line.endswith("validation 20.00% (0.00%), test 20.00% (0.00%)") for line in said)
    assert sum(line.startswith("warning: more than 10% of a held-out split") for line in said) == 1


@pytest.mark.parametrize("character", ["ACGT", " ", "中"])
def test_words_of_any_length_do_not_hold_up_the_training_of_a_tokenizer(character):
    text = "before " + character * 125_000 + " after"
    pieces = list(tokens._shortened_words(text))
    assert "".join(pieces) == text
    longest = max(len(word) for piece in pieces for word in re.findall(r"\S+|\s+", piece))
    assert longest <= 2 * tokens._WORD_CHARACTERS
    assert list(tokens._shortened_words("a usual text")) == ["a usual text"]
    assert tokenizer.train(pieces, 300).encode(text[:1000]).ids
