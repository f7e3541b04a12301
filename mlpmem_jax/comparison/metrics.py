"""Metrics of answers: exact match, token match, choices among texts, choices among words."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence

import numpy as np
import scipy.special

from mlpmem_jax.comparison.question import Answer, Question

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_TINY = 1e-10  # added to probabilities of words before their logarithm (knnlm-limits)


def normalized(text: str) -> str:
    """SQuAD's normalization: lower case, no punctuation, no articles, single spaces (Rajpurkar et al., 2016)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(text: str, answers: Sequence[str]) -> float:
    """1 if the normalized text equals one of the normalized answers, else 0."""
    return float(normalized(text) in {normalized(answer) for answer in answers})


def token_match(text: str, answers: Sequence[str]) -> float:
    """1 if the text contains the tokens of an answer as a run, else 0: DPR's has_answer (Karpukhin et al., 2020)."""
    tokens = _tokens(text)
    for answer in map(_tokens, answers):
        starts = range(len(tokens) - len(answer) + 1) if answer else ()
        if any(tokens[start : start + len(answer)] == answer for start in starts):
            return 1.0
    return 0.0


def _tokens(text: str) -> list[str]:
    """Runs of letters, digits and marks, and every other single character, in lower case."""
    # \w without the underscore is letters and digits; marks are combining characters.
    runs = re.findall(r"(?:[^\W_]|[\u0300-\u036f])+|[^\s]", unicodedata.normalize("NFD", text))
    return [run.lower() for run in runs]


def open_answer(question: Question, answer: Answer) -> dict[str, float]:
    """Metrics of an open question: `gold` are the accepted answers, continuations are " " + answer."""
    measures = {"gold log-probability": float(scipy.special.logsumexp(answer.continuations_J))}
    if answer.text is not None:
        measures["exact match"] = exact_match(answer.text, question.gold)
        measures["token match"] = token_match(answer.text, question.gold)
    return measures


def truthfulness(question: Question, answer: Answer) -> dict[str, float]:
    """MC1, MC2 and MC3 (Lin et al., 2022; DoLa's script) and their mean.

    `question.gold` is (number of true answers, index of the best one); true answers come first.
    """
    count, best = question.gold
    true, false = np.split(np.asarray(answer.continuations_J, np.float64), [count])
    mc2 = np.exp(scipy.special.logsumexp(true) - scipy.special.logsumexp(np.concatenate([true, false])))
    measures = {
        "MC1": float(true[best] > false.max()),
        "MC2": float(mc2) if np.isfinite(mc2) else 0.0,
        "MC3": float(np.mean(true > false.max())),
    }
    return {"mean of MC1, MC2, MC3": float(np.mean(list(measures.values()))), **measures}


def choice_scores(answer: Answer) -> np.ndarray:
    """The scores that choices are ranked by, float64 [choices]: log-probabilities of texts, or PMI of labels.

    The domain-conditional PMI of a label is the sum over its words of ln p(word | prompt) - ln p(word | domain), as in
    knnlm-limits (Holtzman et al., 2021; fuzzy verbalizers of Shi et al., 2022).
    """
    if not answer.words:
        return np.asarray(answer.continuations_J, np.float64)
    pairs = zip(answer.words, answer.domain_words, strict=True)
    return np.array([np.sum(np.log(np.exp(words) + _TINY) - np.log(np.exp(domain) + _TINY)) for words, domain in pairs])


def domain_pmi(question: Question, answer: Answer) -> dict[str, float]:
    """Accuracy of the label with the largest domain-conditional PMI, and of the most probable label."""
    masses = [np.sum(np.exp(words)) for words in answer.words]
    return {
        "accuracy": float(np.argmax(choice_scores(answer)) == question.gold),
        "accuracy without the domain": float(np.argmax(masses) == question.gold),
    }


def yes_or_no(question: Question, answer: Answer) -> dict[str, float]:
    """Whether the more probable of the continuations " Yes" and " No" is the gold one; `gold` is its index."""
    return {"accuracy": float(int(np.argmax(answer.continuations_J)) == question.gold)}
