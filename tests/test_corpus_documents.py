import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs import default
from mlpmem_jax.core.errors import UserError
from mlpmem_jax.corpus import documents
from mlpmem_jax.corpus.documents import Document, Part, make_partition, read_selected

TRAIN, VALIDATION, TEST = range(3)


def partition_of(*texts, splits=None, **changes):
    corpus = default.get_config().corpus
    corpus.update({"validation_fraction": 0.2, "test_fraction": 0.2, **changes})
    splits = splits or [""] * len(texts)
    parts = [
        Part(str(i), lambda t=t: (d if isinstance(d, Document) else Document(d) for d in t), split)
        for i, (t, split) in enumerate(zip(texts, splits, strict=True))
    ]
    return parts, make_partition(parts, corpus)


def texts_of(parts, partition, split):
    return [text for _, text in read_selected(parts, partition, partition.split_N == split)]


WORDS = [f"document {index} " * (1 + index % 5) for index in range(200)]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
@given(st.lists(st.sampled_from(WORDS), min_size=3), st.integers(min_value=0, max_value=5))
def test_equal_texts_are_used_once(texts, seed):
    if len(set(texts)) < 3:
        return
    parts, partition = partition_of(texts, seed=seed)
    actual = [texts_of(parts, partition, split) for split in range(3)]
    assert sorted(itertools.chain(*actual)) == sorted(set(texts))
    assert all(actual)
    repeats = len(texts) - len(set(texts))
    assert [note.split()[-1] for note in partition.notes if "duplicates" in note] == ([str(repeats)] if repeats else [])


@st.composite
def grouped(draw):
    """Documents with different texts, in groups of one to ten, and fractions."""
    sizes = draw(st.lists(st.integers(min_value=1, max_value=10), min_size=3, max_size=30))
    names = [f"group {index}" for index, size in enumerate(sizes) for _ in range(size)]
    lengths = draw(st.lists(st.integers(1, 50), min_size=len(names), max_size=len(names)))
    rows = [
        Document(f"{index} " + "x" * length, name)
        for index, (name, length) in enumerate(zip(names, lengths, strict=True))
    ]
    if draw(st.booleans()):
        rows = draw(st.permutations(rows))
    return rows, draw(st.sampled_from([(0.05, 0.05), (0.2, 0.2), (0.45, 0.45), (0.6, 0.3)]))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
@given(grouped(), st.integers(min_value=0, max_value=5))
def test_groups_lie_on_one_side(rows_and_fractions, seed):
    rows, (validation, test) = rows_and_fractions
    _, partition = partition_of(rows, seed=seed, validation_fraction=validation, test_fraction=test)
    sides = {}
    for row, split in zip(rows, partition.split_N.tolist(), strict=True):
        sides.setdefault(row.group, set()).add(split)
    assert all(len(side) == 1 for side in sides.values())
    assert set().union(*sides.values()) == {0, 1, 2}
    for split in range(3):  # groups are numbered in order; each run of one group has one number
        numbers = partition.group_N[partition.split_N == split]
        names = [row.group for row, s in zip(rows, partition.split_N, strict=True) if s == split]
        runs = [name for name, _ in itertools.groupby(names)]
        assert [runs[number] for number in numbers] == names
        assert len(runs) == numbers[-1] + 1


def test_the_shares_are_of_bytes_and_a_large_group_does_not_swallow_a_split():
    rows = [Document(f"{group} {piece} " + "x" * 90, f"{group}") for group in range(100) for piece in range(3)]
    rows += [Document(f"large {piece} " + "x" * 90, "large") for piece in range(100)]
    for seed in range(10):
        _, partition = partition_of(rows, seed=seed, validation_fraction=0.1, test_fraction=0.2)
        shares = np.bincount(partition.split_N, partition.bytes_N) / partition.bytes_N.sum()
        np.testing.assert_allclose(shares, [0.7, 0.1, 0.2], atol=0.01)
        assert set(partition.split_N[300:]) == {TRAIN}


@pytest.mark.parametrize("groups", [1, 2])
def test_one_text_is_split_where_it_stands(groups):
    pieces = [Document(f"piece {index:03d}", f"file {index * groups // 100}") for index in range(100)]
    _, partition = partition_of(pieces, validation_fraction=0.1, test_fraction=0.2)
    assert partition.split_N.tolist() == [TRAIN] * 70 + [VALIDATION] * 10 + [TEST] * 20
    assert partition.group_N.tolist() == [*range(70), *range(10), *range(20)]
    assert any(
        note.endswith("split in order, at paragraphs: first train, then validation, then test")
        for note in partition.notes
    )
    for few in range(3, 8):
        _, partition = partition_of(pieces[:few], validation_fraction=0.01, test_fraction=0.01)
        assert partition.split_N.tolist() == [TRAIN] * (few - 2) + [VALIDATION, TEST]


def test_every_data_set_of_a_mixture_is_in_every_split_and_keeps_its_own():
    def part(name, texts, split=""):
        return Part(f"{name} {split}", lambda: map(Document, texts), split, data_set=name)

    one, two = ([f"{name} {index} " + "x" * 20 for index in range(100)] for name in ("one", "two"))
    parts = [part("one", one[:80], "train"), part("one", one[80:], "test"), part("two", two)]
    corpus = default.get_config().corpus
    corpus.update({"validation_fraction": 0.1, "test_fraction": 0.1})
    partition = make_partition(parts, corpus)
    actual = [texts_of(parts, partition, split) for split in range(3)]
    assert [text for text in actual[TEST] if text in one] == one[80:]
    assert [sum(text in one for text in texts) for texts in actual] == [72, 8, 20]
    assert [sum(text in two for text in texts) for texts in actual] == [80, 10, 10]


def test_rows_without_text_and_unpaired_surrogates_are_counted():
    parts, partition = partition_of(["a", "", "b", " \n", "c", "half \ud83d", "d"])
    assert sorted(itertools.chain(*(texts_of(parts, partition, split) for split in range(3)))) == [
        "a", "b", "c", "d", "half \ufffd",
    ]  # fmt: skip
    assert partition.notes == (
        "dropped rows without text: 2", "documents in which U+FFFD replaced unpaired surrogates: 1",
    )  # fmt: skip


def test_scattered_groups_are_told():
    rows = [Document(f"{index:02d}", f"group {index % 5}") for index in range(50)]  # three groups to train on
    _, partition = partition_of(rows)
    assert any(note.startswith("the documents of 3 groups are not contiguous") for note in partition.notes)
    _, partition = partition_of(sorted(rows, key=lambda row: row.group))
    assert not partition.notes


def test_fractions_and_seed():
    _, partition = partition_of(WORDS, validation_fraction=0.1, test_fraction=0.3)
    shares = np.bincount(partition.split_N, partition.bytes_N) / partition.bytes_N.sum()
    np.testing.assert_allclose(shares, [0.6, 0.1, 0.3], atol=0.02)
    _, other = partition_of(WORDS, validation_fraction=0.1, test_fraction=0.3, seed=1)
    assert (partition.split_N != other.split_N).any()


def test_a_split_follows_the_text_and_not_its_place():
    parts, partition = partition_of(WORDS)
    moved, moved_plan = partition_of(WORDS[100:], WORDS[:100][::-1])
    for split in range(3):
        assert set(texts_of(parts, partition, split)) == set(texts_of(moved, moved_plan, split))


def test_max_bytes_takes_a_sample_and_not_a_prefix():
    parts, partition = partition_of(WORDS, max_bytes=2000)
    used = np.flatnonzero(partition.split_N >= 0)
    assert 1900 < partition.bytes_N[used].sum() <= 2000
    assert used[0] < 30
    assert used[-1] >= 170
    _, larger = partition_of(WORDS, max_bytes=4000)
    assert set(used) < set(np.flatnonzero(larger.split_N >= 0))
    np.testing.assert_array_equal(partition.split_N[used], larger.split_N[used])
    assert all(texts_of(parts, partition, split) for split in range(3))


def test_splits_of_the_source_are_kept():
    parts, partition = partition_of(WORDS[:100], WORDS[100:120], WORDS[120:150], splits=["train", "validation", "test"])
    assert texts_of(parts, partition, TRAIN) == WORDS[:100]
    assert texts_of(parts, partition, VALIDATION) == WORDS[100:120]
    assert texts_of(parts, partition, TEST) == WORDS[120:150]


def test_a_text_in_two_splits_of_the_source_stays_in_the_later_one():
    parts, partition = partition_of(
        ["a", "b", "c", "d"], ["b", "e", "c"], ["c", "f"], splits=["train", "validation", "test"]
    )
    assert [texts_of(parts, partition, split) for split in range(3)] == [["a", "d"], ["b", "e"], ["c", "f"]]


def test_a_missing_split_is_taken_from_the_training_documents():
    parts, partition = partition_of(WORDS[:100], WORDS[100:], splits=["train", "test"])
    assert texts_of(parts, partition, TEST) == WORDS[100:]
    assert 18 <= len(texts_of(parts, partition, VALIDATION)) <= 22  # a fifth of the bytes
    assert sorted(texts_of(parts, partition, VALIDATION) + texts_of(parts, partition, TRAIN)) == sorted(WORDS[:100])


def test_max_bytes_samples_each_split_of_the_source_to_its_share():
    parts, partition = partition_of(WORDS[:150], WORDS[150:], splits=["train", "test"], max_bytes=2000)
    sizes = [sum(len(text) for text in texts_of(parts, partition, split)) for split in range(3)]
    assert 1400 < sizes[TRAIN] + sizes[VALIDATION] <= 1600
    assert 320 < sizes[TEST] <= 400


def test_shards_are_runs_of_documents_of_about_one_size(monkeypatch):
    monkeypatch.setattr(documents, "SHARD_BYTES", 300)
    parts, partition = partition_of([*WORDS[:50], "x" * 2000, *WORDS[50:]])
    assert (np.diff(partition.shard_N) >= 0).all()
    assert set(np.diff(partition.shard_N)) == {0, 1}
    for shard in range(partition.num_shards):
        inside = np.flatnonzero(partition.shard_N == shard)
        assert partition.bytes_N[inside[:-1]].sum() < 300
        assert [text for _, text in read_selected(parts, partition, partition.shard_N == shard)]
    for split in range(3):
        largest = max(
            (partition.bytes_N[(partition.shard_N == shard) & (partition.split_N == split)] + 2).sum()
            for shard in range(partition.num_shards)
        )
        assert partition.capacity(split) == largest


def test_only_the_parts_that_are_needed_are_opened():
    opened = []

    def part(name):
        def read():
            for index in range(10):
                opened.append((name, index))
                yield Document(f"{name} {index}")

        return Part(name, read)

    parts = [part("a"), part("b"), part("c")]
    corpus = default.get_config().corpus
    partition = make_partition(parts, corpus)
    opened.clear()
    selected = np.zeros(30, bool)
    selected[[11, 13]] = True
    assert list(read_selected(parts, partition, selected)) == [(11, "b 1"), (13, "b 3")]
    assert opened == [("b", index) for index in range(4)]


def test_no_text_at_all_names_the_parts():
    with pytest.raises(UserError, match=r"no text in 0, 1, 2, \.\.\.; expected"):
        partition_of([], [], [], [])


@pytest.mark.parametrize("texts", [["one"], ["one", "two"], ["one", "two", "two", "one"]])
def test_too_few_documents(texts):
    with pytest.raises(UserError, match=r"config\.corpus: \d different documents leave the validation split empty"):
        partition_of(texts)
