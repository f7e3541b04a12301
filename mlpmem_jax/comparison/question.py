"""What a task asks, and what a system answers."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlpmem_jax.comparison.hub import DataSet


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
      id: distinct within its task.
      query: what a retriever searches for.
      fields: of its prompt, by name.
      continuations: texts whose log-probability after the prompt is asked for, a space in front included.
      words: for each label, the words whose first tokens are compared as the next token; () = none.
      gold: what the task's measures compare with.
      accepted: right answers, to be shown.
      source: the text that holds the answer, where the task brings one; the question is asked only where a system could
        have read it.
    """

    id: str
    query: str
    fields: Mapping[str, str]
    continuations: tuple[str, ...] = ()
    words: tuple[tuple[str, ...], ...] = ()
    gold: Any = None
    accepted: tuple[str, ...] = ()
    source: str = ""

    @property
    def choices(self) -> list[str]:
        """How choices are shown: each text, or the first word of each label."""
        return [text.strip() for text in (*self.continuations, *(group[0] for group in self.words))]


class Answer(NamedTuple):
    """What one system says to one question, at one interpolation weight.

    Attributes:
      continuations_C: log-probability of each continuation, in nats.
      words: for each label, log-probabilities of its words as the next token.
      domain_words: the same after the task's domain prompt.
      text: generated, without the prompt; None where none was asked for.
    """

    continuations_C: np.ndarray
    words: Sequence[np.ndarray] = ()
    domain_words: Sequence[np.ndarray] = ()
    text: str | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """A task: `tasks/NAME.py` has one as TASK, or `tasks/NAME.toml` describes one (see `tasks.find`).

    Attributes:
      title: how tables call it.
      load: folder of data files -> {"test": questions} or {"test": ..., "validation": ...}. Without a validation
        split, interpolation weights are tuned on one half of the questions for the other.
      template: of the prompt, with the names of `Question.fields` in braces.
      measure: (question, answer) -> {measure: value}.
      headline: the measure that tables show.
      tuned_on: the measure, of log-probabilities alone, whose mean the interpolation weight maximizes.
      max_new_tokens: of a generated text; 0 = none is asked for.
      stop: strings that end a generated text.
      background_template: of the prompt with passages, which are {passages}; "" = they stand in front of the prompt.
      domain: the prompt that stands for the domain alone, of tasks that compare words (domain-conditional PMI).
      single_tokens: words of several tokens are left out; else they count by their first one.
      hub: where the Hugging Face hub has the data, by the names of files in the folder.
      source: of the protocol.
    """

    title: str
    load: Callable[[pathlib.Path], Mapping[str, list[Question]]]
    template: str
    measure: Callable[[Question, Answer], dict[str, float]]
    headline: str
    tuned_on: str
    max_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    background_template: str = ""
    domain: str = ""
    single_tokens: bool = False
    hub: Mapping[str, DataSet] = dataclasses.field(default_factory=dict)
    source: str = ""

    def prompt(self, question: Question, passages: Sequence[str] = ()) -> str:
        """What the language model reads."""
        if not passages:
            return self.template.format(**question.fields)
        numbered = " ".join(f"{number}. {passage}" for number, passage in enumerate(passages, start=1))
        if self.background_template:
            return self.background_template.format(passages=numbered, **question.fields)
        return f"Background: {numbered}\n\n{self.template.format(**question.fields)}"
