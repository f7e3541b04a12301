import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import default
from mlpmem_jax.core.errors import UserError
from mlpmem_jax.corpus import documents
from mlpmem_jax.corpus.documents import Part, make_plan, read_selected

TRAIN, VALIDATION, TEST = range(3)


def plan_of(*texts, splits=None, **changes):
    corpus = default.get_config().corpus
    corpus.update({"validation_fraction": 0.2, "test_fraction": 0.2, **changes})
    splits = splits or [""] * len(texts)
    parts = [Part(str(i), lambda t=t: iter(t), split) for i, (t, split) in enumerate(zip(texts, splits, strict=True))]
    return parts, make_plan(parts, corpus)


def texts_of(parts, plan, split):
    return [text for _, text in read_selected(parts, plan, plan.split_N == split)]


WORDS = [f"document {index} " * (1 + index % 5) for index in range(200)]


@given(st.lists(st.sampled_from(WORDS), min_size=3), st.integers(min_value=0, max_value=5))
def test_equal_texts_share_a_split(texts, seed):
    if len(set(texts)) < 3:
        return
    parts, plan = plan_of(texts, seed=seed)
    found = [set(texts_of(parts, plan, split)) for split in range(3)]
    assert set.union(*found) == set(texts)
    assert all(found)
    assert not any(a & b for a, b in itertools.combinations(found, 2))


def test_fractions_and_seed():
    parts, plan = plan_of(WORDS, validation_fraction=0.1, test_fraction=0.3)
    assert [len(texts_of(parts, plan, split)) for split in range(3)] == [120, 20, 60]
    _, other = plan_of(WORDS, validation_fraction=0.1, test_fraction=0.3, seed=1)
    assert (plan.split_N != other.split_N).any()


def test_a_split_follows_the_text_and_not_its_place():
    parts, plan = plan_of(WORDS)
    turned, turned_plan = plan_of(WORDS[100:], WORDS[:100][::-1])
    for split in range(3):
        assert set(texts_of(parts, plan, split)) == set(texts_of(turned, turned_plan, split))


def test_max_bytes_takes_a_sample_and_not_a_prefix():
    parts, plan = plan_of(WORDS, max_bytes=2000)
    used = np.flatnonzero(plan.split_N >= 0)
    assert 1900 < plan.bytes_N[used].sum() <= 2000
    assert used[0] < 30
    assert used[-1] >= 170
    _, larger = plan_of(WORDS, max_bytes=4000)
    assert set(used) < set(np.flatnonzero(larger.split_N >= 0))
    assert all(texts_of(parts, plan, split) for split in range(3))


def test_splits_of_the_source_are_kept():
    parts, plan = plan_of(WORDS[:100], WORDS[100:120], WORDS[120:150], splits=["train", "validation", "test"])
    assert texts_of(parts, plan, TRAIN) == WORDS[:100]
    assert texts_of(parts, plan, VALIDATION) == WORDS[100:120]
    assert texts_of(parts, plan, TEST) == WORDS[120:150]


def test_a_text_in_two_splits_of_the_source_stays_in_the_later_one():
    parts, plan = plan_of(["a", "b", "c", "d"], ["b", "e", "c"], ["c", "f"], splits=["train", "validation", "test"])
    assert [texts_of(parts, plan, split) for split in range(3)] == [["a", "d"], ["b", "e"], ["c", "f"]]


def test_a_missing_split_is_taken_from_the_training_documents():
    parts, plan = plan_of(WORDS[:100], WORDS[100:], splits=["train", "test"])
    assert texts_of(parts, plan, TEST) == WORDS[100:]
    assert len(texts_of(parts, plan, VALIDATION)) == 20
    assert sorted(texts_of(parts, plan, VALIDATION) + texts_of(parts, plan, TRAIN)) == sorted(WORDS[:100])


def test_max_bytes_samples_each_split_of_the_source_to_its_share():
    parts, plan = plan_of(WORDS[:150], WORDS[150:], splits=["train", "test"], max_bytes=2000)
    sizes = [sum(len(text) for text in texts_of(parts, plan, split)) for split in range(3)]
    assert 1400 < sizes[TRAIN] + sizes[VALIDATION] <= 1600
    assert 320 < sizes[TEST] <= 400


def test_shards_are_runs_of_documents_of_about_one_size(monkeypatch):
    monkeypatch.setattr(documents, "SHARD_BYTES", 300)
    parts, plan = plan_of([*WORDS[:50], "x" * 2000, *WORDS[50:]])
    assert (np.diff(plan.shard_N) >= 0).all()
    assert set(np.diff(plan.shard_N)) == {0, 1}
    for shard in range(plan.num_shards):
        inside = np.flatnonzero(plan.shard_N == shard)
        assert plan.bytes_N[inside[:-1]].sum() < 300
        assert [text for _, text in read_selected(parts, plan, plan.shard_N == shard)]
    for split in range(3):
        largest = max(
            (plan.bytes_N[(plan.shard_N == shard) & (plan.split_N == split)] + 2).sum()
            for shard in range(plan.num_shards)
        )
        assert plan.capacity(split) == largest


def test_only_the_parts_that_are_needed_are_opened():
    opened = []

    def part(name):
        def read():
            for index in range(10):
                opened.append((name, index))
                yield f"{name} {index}"

        return Part(name, read)

    parts = [part("a"), part("b"), part("c")]
    corpus = default.get_config().corpus
    plan = make_plan(parts, corpus)
    opened.clear()
    selected = np.zeros(30, bool)
    selected[[11, 13]] = True
    assert list(read_selected(parts, plan, selected)) == [(11, "b 1"), (13, "b 3")]
    assert opened == [("b", index) for index in range(4)]


def test_no_text_at_all_names_the_parts():
    with pytest.raises(UserError, match=r"no text in 0, 1, 2, \.\.\.; expected"):
        plan_of([], [], [], [])


@pytest.mark.parametrize("texts", [["one"], ["one", "two"], ["one", "two", "two", "one"]])
def test_too_few_documents(texts):
    with pytest.raises(UserError, match=r"config\.corpus: \d different documents give no train split"):
        plan_of(texts)
