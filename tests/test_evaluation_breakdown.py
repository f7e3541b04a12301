"""Gains by kind of position against plain loops over Python lists."""

import numpy as np
import pytest
import scipy.stats

from mlpmem_jax.evaluation import breakdown


@pytest.mark.parametrize("vocab_size", [3, 200_000], ids=["many repeats", "four tokens exceed 64 bits"])
def test_contexts_are_counted_across_pieces(vocab_size):
    generator = np.random.default_rng(0)
    letters = generator.choice(vocab_size, 3, replace=False)
    text = letters[generator.integers(3, size=500)]
    contexts_Nx4 = np.concatenate([letters[generator.integers(3, size=(40, 4))], [[vocab_size - 1] * 3 + [0]]])
    counter = breakdown.ContextCounter(contexts_Nx4, vocab_size)
    for piece in np.split(text, [1, 2, 2, 4, 150, 151, 400]):  # also shorter than a context
        counter.add(piece.astype(np.int32))
    grams = [tuple(text[at : at + 4].tolist()) for at in range(len(text) - 3)]
    assert counter.counts().tolist() == [grams.count(tuple(context)) for context in contexts_Nx4.tolist()]
    assert counter.counts().max() > 2


def test_a_text_without_contexts_to_count_has_none():
    counter = breakdown.ContextCounter(np.empty((0, 4), np.int64), 10)
    counter.add(np.arange(10))
    assert counter.counts().shape == (0,)


def test_gains_are_means_over_the_positions_of_a_bin():
    generator = np.random.default_rng(1)
    values_N, clusters_N = generator.integers(0, 50, size=300), np.arange(300) // 30
    base_N = -generator.gamma(2.0, size=300)
    systems = {"better": base_N + generator.normal(0.3, 0.5, size=300), "worse": base_N - 0.1}
    values_N[:3], clusters_N[-3:] = 1000, 3
    actual = breakdown.gains_by(values_N, (0, 1, 10, 100, 1000), base_N, systems, clusters_N, confidence=0.9)
    assert [(row["from"], row["below"]) for row in actual] == [(0, 1), (1, 10), (10, 100), (1000, None)]
    for row in actual:
        below = row["below"] or np.inf
        chosen = [at for at, value in enumerate(values_N.tolist()) if row["from"] <= value < below]
        assert row["positions"] == len(chosen)
        assert row["share_of_positions"] == len(chosen) / 300
        assert row["base"] == pytest.approx(-base_N[chosen].mean())
        gains = [systems["better"][at] - base_N[at] for at in chosen]
        assert row["gain"] == pytest.approx({"better": np.mean(gains), "worse": -0.1})
        assert row["share_of_gain"]["better"] == pytest.approx(sum(gains) / (systems["better"] - base_N).sum())
        assert row["share_of_gain"]["worse"] is None
        if row["from"] == 1000:
            assert row["interval"]["better"] is None  # a single document
            continue
        low, high = row["interval"]["better"]
        assert low < row["gain"]["better"] < high
    assert sum(row["share_of_gain"]["better"] for row in actual) == pytest.approx(1)


def test_an_interval_is_students_over_documents_of_one_size():
    generator = np.random.default_rng(2)
    gains_UxT = generator.normal(0.2, 1.0, size=(6, 10))
    base_N = np.full(60, -3.0)
    (row,) = breakdown.gains_by(
        np.zeros(60), (0, 1), base_N, {"s": base_N + gains_UxT.ravel()}, np.arange(60) // 10 + 7, confidence=0.95
    )
    of_documents_U = gains_UxT.mean(axis=1)
    expected = scipy.stats.t.interval(0.95, 5, of_documents_U.mean(), scipy.stats.sem(of_documents_U))
    assert row["interval"]["s"] == pytest.approx(expected)
