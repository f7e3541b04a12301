"""How answers are judged, against the definitions written out, and passages against a plain reading of the text."""

import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

from mlpmem_jax.comparison import metrics, passages
from mlpmem_jax.comparison.question import Answer, Question
from mlpmem_jax.core.mesh import make_mesh


def question(gold):
    return Question("1", "", {}, gold=gold)


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("The Beatles!", ["beatles"], 1),
        ("  an   apple a day ", ["apple day"], 1),
        ("Theory", ["ory"], 0),
        ("14 December 1972.", ["December 1972", "14 december 1972"], 1),
        ("", ["x"], 0),
    ],
)
def test_exact_match(text, answers, expected):
    assert metrics.exact_match(text, answers) == expected


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("It was David Seville, of course", ["David Seville"], 1),
        ("It was David", ["David Seville"], 0),
        ("a starfish", ["star"], 0),
        ("Röntgen", ["ro\u0308ntgen"], 1),
        ("U.S. dollars", ["u.s."], 1),
        ("anything", [""], 0),
    ],
)
def test_token_match(text, answers, expected):
    assert metrics.token_match(text, answers) == expected


def test_the_gold_log_probability_adds_up_accepted_answers():
    measures = metrics.open_answer(question(("yes",)), Answer(np.log([0.2, 0.3]), text="Yes."))
    assert measures == {"gold log-probability": pytest.approx(np.log(0.5)), "exact match": 1.0, "token match": 1.0}


@given(st.lists(st.floats(-30, -0.1), min_size=3, max_size=9), st.data())
def test_truthfulness_by_its_definitions(values, data):
    count = data.draw(st.integers(1, len(values) - 1))
    best = data.draw(st.integers(0, count - 1))
    true, false = np.array(values[:count]), np.array(values[count:])
    actual = metrics.truthfulness(question((count, best)), Answer(np.array(values)))
    assert actual["MC1"] == float(true[best] > false.max())
    assert actual["MC2"] == pytest.approx(np.exp(true).sum() / (np.exp(true).sum() + np.exp(false).sum()))
    assert actual["MC3"] == np.mean([one > false.max() for one in true])
    assert actual["mean of MC1, MC2, MC3"] == pytest.approx((actual["MC1"] + actual["MC2"] + actual["MC3"]) / 3)


def test_truthfulness_of_texts_whose_probabilities_underflow():
    actual = metrics.truthfulness(question((1, 0)), Answer(np.array([-1000.0, -1001.0])))
    assert actual["MC2"] == pytest.approx(scipy.special.expit(1.0))


def test_domain_pmi_is_the_sum_over_words():
    random = np.random.default_rng(0)
    words, domain = random.dirichlet(np.ones(9), 2)
    groups = np.split(np.log(words), [4]), np.split(np.log(domain), [4])
    scores = [
        sum(np.log(words[i] + 1e-10) - np.log(domain[i] + 1e-10) for i in group) for group in (range(4), range(4, 9))
    ]
    masses = [words[:4].sum(), words[4:].sum()]
    actual = metrics.domain_pmi(question(1), Answer(np.zeros(0), *groups))
    assert actual["accuracy"] == float(scores[1] > scores[0])
    assert actual["accuracy without the domain"] == float(masses[1] > masses[0])


@given(st.lists(st.text("ab \n", max_size=12), max_size=20).map(" ".join), st.integers(1, 7))
def test_passages_hold_every_word_once_and_no_more_than_asked(text, words):
    actual = passages.split(text, words)
    assert [word for passage in actual for word in passage.split()] == text.split()
    sizes = [len(passage.split()) for passage in actual]
    assert max(sizes, default=0) <= words
    assert max(sizes, default=0) - min(sizes, default=0) <= 1


TEXTS = ["the river Arrow runs through Aldford", "bread is made of flour and water", "Aldford has seven mills"]


def test_bm25_finds_the_passages_with_the_words_asked_for():
    actual = passages.BM25(TEXTS).retrieve(["Which river is Aldford on?", "flour"], 2)
    assert [one[0] for one in actual] == TEXTS[:2]
    assert [len(one) for one in passages.BM25(TEXTS).retrieve(["flour"], 9)] == [3]


def test_a_sentence_encoder_finds_its_own_nearest_texts(tmp_path):
    import sentence_transformers
    import transformers

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]))
    config = transformers.BertConfig(
        vocab_size=13, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    texts = ["a b c", "d e f", "g h"]
    encoder = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    vectors = encoder.encode([*texts, "a b"], normalize_embeddings=True)
    expected = [texts[index] for index in np.argsort(-(vectors[:3] @ vectors[3]))]
    assert passages.Dense(texts, str(tmp_path), {}, make_mesh(), tmp_path).retrieve(["a b"], 3) == [expected]
