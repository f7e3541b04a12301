"""Open questions: a text is generated and compared with the accepted answers."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from mlpmem_jax.comparison.question import Question
from mlpmem_jax.core.errors import UserError


def question(file: pathlib.Path, number: int, text: str, answers: str | Sequence[str], source: str = "") -> Question:
    """An open question with its accepted answers.

    Raises:
      UserError: the row, which the message names, has no question or no answer.
    """
    accepted = [answers] if isinstance(answers, str) else answers
    if not isinstance(accepted, list) or not all(isinstance(answer, str) for answer in accepted):
        raise UserError(f"{file}: row {number}: expected answers as text or a list of texts, found {answers!r:.80}")
    accepted = [answer.strip() for answer in accepted if answer.strip()]
    if not text.strip() or not accepted:
        raise UserError(f"{file}: row {number} has no {'question' if accepted else 'answers'}")
    return Question(
        id=str(number),
        query=text,
        fields={"question": text},
        continuations=tuple(f" {answer}" for answer in dict.fromkeys(accepted)),
        gold=tuple(accepted),
        accepted=tuple(accepted),
        source=source,
    )


def with_question_mark(text: str) -> str:
    """Ends the question with a question mark and lowercases its first letter, as the paper does for NQ and HotpotQA."""
    if not text.strip():
        return text  # `question` refuses it
    text = text if text.endswith("?") else f"{text}?"
    return text[0].lower() + text[1:]
