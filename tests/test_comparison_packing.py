"""Packed texts: every one of them read as if it stood alone, and what they share computed once."""

import jax
import numpy as np
import pytest
import scipy.special

from mlpmem_jax.comparison import packing, reading
from mlpmem_jax.comparison.packing import Row
from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.models import language_model
from mlpmem_jax.models.gpt2 import GPT2Config
from mlpmem_jax.models.llama import LlamaConfig

MODELS = {
    "gpt2": GPT2Config(vocab_size=40, context_length=96, width=12, blocks=2, heads=3),
    "mistral": LlamaConfig(40, 96, 12, 2, 4, 2, 6, 20, sliding_window=7, family="mistral"),
}


def made_rows(seed, has_prefix):
    """Questions with several answers each, of which some begin alike, and one that has nothing in common with them."""
    random = np.random.default_rng(seed)

    def text(low, high):
        return random.integers(1, 40, random.integers(low, high)).tolist()

    prefix, rows = text(20, 24) if has_prefix else [], []
    for _ in range(6):
        prompt = prefix + text(3, 14)
        answers = [text(1, 9) for _ in range(random.integers(1, 5))]
        rows += [Row.of_continuation(prompt, prompt + answer) for answer in [*answers, answers[0] + text(1, 3)]]
        rows.append(Row.of_next(prompt, text(5, 6)))
    return [*rows, Row.of_next(text(4, 5), text(7, 8)), Row.of_continuation(text(1, 2), text(60, 61))]


@pytest.mark.parametrize(("name", "has_prefix"), [("gpt2", False), ("mistral", True)])
def test_packed_texts_are_read_as_if_each_stood_alone(name, has_prefix):
    model, rows = MODELS[name], made_rows(3, has_prefix)
    parameters = jax.tree.map(lambda array: 8 * array, language_model.init(model, jax.random.key(0)))
    assert bool(packing.shared_prefix(rows)) == has_prefix
    tokens_BxT = np.zeros((len(rows), max(len(row.tokens_T) for row in rows)), np.int32)
    for tokens_T, row in zip(tokens_BxT, rows, strict=True):
        tokens_T[: len(row.tokens_T)] = row.tokens_T
    alone_BxTxV = scipy.special.log_softmax(np.asarray(language_model.logits(parameters, model, tokens_BxT)), axis=-1)
    sharding = Sharding(make_mesh(devices=jax.devices()[:2]))
    actual = reading.read(reading.Model(parameters, model), rows, {}, sharding, "texts")[0]["model"]
    mixed = reading.read_mixture(reading.Model(parameters, model), rows, None, 0.0, sharding, "texts")
    for number, row in enumerate(rows):
        log_PxV = alone_BxTxV[number, list(row.positions_P)]
        expected = [[log_V[token] for token in ids] for log_V, ids in zip(log_PxV, row.ids_PxJ, strict=True)]
        np.testing.assert_allclose(actual[number], expected, rtol=1e-4, err_msg=f"row {number}")
        np.testing.assert_allclose(mixed[number][0], expected, rtol=1e-4, err_msg=f"row {number}")
        np.testing.assert_array_equal(mixed[number][1], log_PxV.argmax(1)[:, None] == np.array(row.ids_PxJ))


def test_what_texts_share_is_computed_once():
    prompt = list(range(1, 31))
    question, answers = [*prompt, 31, 32], [[33, 34], [35], [36, 37, 38]]
    rows = [Row.of_continuation(question, question + answer) for answer in answers]
    rows += [Row.of_next([*prompt, token, 39], [1, 2]) for token in range(40, 49)]
    assert packing.shared_prefix(rows) == prompt
    (batch,) = packing.batches(rows, range(len(rows)), len(prompt), shards=1)
    # The question's two tokens, and all but the last of each answer; two of each of the other questions.
    assert (batch.layout.positions >= len(prompt)).sum() == 2 + 1 + 0 + 2 + 9 * 2
    assert sorted(row for row, _, _ in batch.parts) == list(range(len(rows)))


def test_no_text_is_read_in_what_is_shared():
    prompt = list(range(1, 31))
    rows = [Row.of_next(prompt, [token]) for token in (1, 2, 3)]
    assert packing.shared_prefix(rows) == prompt[:-1]
    assert packing.shared_prefix([Row.of_next([1, *prompt[index:]], [0]) for index in range(4)]) == []


def test_the_time_of_a_side_is_not_the_language_models(monkeypatch):
    now = [0.0]  # the clock moves in the side alone
    monkeypatch.setattr(reading.time, "perf_counter", lambda: now[0])

    class Slow:
        block = 1

        def log_probabilities(self, states_BxD, places_M, ids_M):
            now[0] += 100.0
            return np.zeros(len(ids_M))

    model = MODELS["gpt2"]
    of = reading.Model(language_model.init(model, jax.random.key(0)), model)
    sharding = Sharding(make_mesh(devices=jax.devices()[:1]))
    values, seconds = reading.read(of, made_rows(3, has_prefix=False), {"slow": Slow()}, sharding, "texts")
    assert seconds["model"] == 0 < seconds["slow"]
    assert values.keys() == seconds.keys() == {"model", "slow"}
