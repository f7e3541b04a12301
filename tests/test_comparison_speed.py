"""The table of `mlpmem compare --speed`, and the corpora that it times searches of."""

import numpy as np

from mlpmem_jax.comparison import speed, speed_page


def test_ratios_are_of_one_round():
    base = {
        "system": "base",
        "positions": 9,
        "batch": 2,
        "prompt_tokens": 5,
        "first": [1.0, 2.0, 4.0],
        "next": [1.0] * 3,
    }
    other = base | {"system": "knn_lm", "first": [3.0, 4.0, 8.0], "next": [2.0, 4.0, 8.0]}
    rows = speed_page.rows({"titles": {"base": "base", "knn_lm": "kNN"}, "measured": [base, other]})
    assert rows[1] == ["kNN", "9", "2", "5", "4,000.0 (3,000.0 to 8,000.0)", "2.00", "0.5 (0.2 to 1.0)", "0.25"]


def test_made_keys_are_the_real_ones_and_then_others_near_them(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "_KEYS_AT_ONCE", 7)
    keys_NxD = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float16)
    whole = speed._with_noisy_copies(keys_NxD, 33, f"{tmp_path}/keys")
    assert whole.shape == (33, 4)
    assert whole.dtype == np.float16
    np.testing.assert_array_equal(whole[:10], keys_NxD)
    distances = np.abs(whole[10:].astype(np.float32) - np.resize(keys_NxD, (33, 4))[10:]).max(axis=1)
    assert distances.min() > 0
    assert distances.max() < 1
    assert len(np.unique(whole, axis=0)) == 33


def test_made_passages_have_the_words_of_real_ones():
    real = ["a b c d e f", "g h"]
    made = speed._more_passages(real, 5)
    assert made[:2] == real
    assert [sorted(passage.split()) for passage in made] == [sorted(real[n % 2].split()) for n in range(5)]
    assert speed._more_passages(real, 1) == real[:1]
