import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlpmem_jax.corpus import overlap

WORDS = ["a", "B", "b", "the", "The", "ü", "x,", "1"]


def oracle(train, held_out, length):
    """The definition, with sets of tuples of words."""
    runs = set()
    for text in train:
        words = text.lower().split()
        runs.update(tuple(words[i : i + length]) for i in range(len(words) - length + 1))
    inside = total = 0
    for text in held_out:
        words = text.lower().split()
        covered = set()
        for i in range(len(words) - length + 1):
            if tuple(words[i : i + length]) in runs:
                covered.update(range(i, i + length))
        inside, total = inside + len(covered), total + len(words)
    return inside / total if total else 0.0


texts = st.lists(st.lists(st.sampled_from(WORDS[:3]), max_size=40).map(" ".join), max_size=8)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
@given(texts, texts, texts)
def test_shares_are_those_of_the_definition(train, validation, test):
    actual = overlap.measure(iter(train), {"validation": iter(validation), "test": iter(test)})
    for split, held_out in (("validation", validation), ("test", test)):
        for length in (13, 25):
            assert actual[split][str(length)] == pytest.approx(oracle(train, held_out, length))


def test_copies_are_found_however_they_are_wrapped_and_batches_make_no_difference(monkeypatch):
    generator = random.Random(0)

    def prose(count):
        return [f"w{generator.randrange(2000)}" for _ in range(count)]

    copied = prose(300)
    train = [" ".join(prose(500)) for _ in range(40)] + [" ".join([*prose(20), *copied, *prose(20)])]
    test = ["\n  ".join([*prose(700), *(word.upper() for word in copied)])]
    whole = overlap.measure(train, {"test": test})
    assert whole["test"]["13"] == pytest.approx(0.3, abs=1e-3)
    assert whole["test"]["25"] == pytest.approx(0.3, abs=1e-3)
    monkeypatch.setattr(overlap, "_BATCH_WORDS", 1)
    assert overlap.measure(train, {"test": test}) == whole
    assert overlap.measure(train[:40], {"test": test})["test"] == {"13": 0.0, "25": 0.0}


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 6))
def test_hashes_are_equal_where_runs_are(numbers, length):
    words = np.array(numbers, np.int64)
    hashes = overlap.word_runs(words, length).tolist()
    runs = [tuple(numbers[i : i + length]) for i in range(len(numbers) - length + 1)]
    assert len(hashes) == len(runs)
    assert len(set(zip(hashes, runs, strict=True))) == len(set(hashes)) == len(set(runs))
    assert overlap.whole_runs(words, length).tolist() == [0 not in run for run in runs]
