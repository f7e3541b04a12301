"""Data types: a task, its questions, and a system's answers."""

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
      id: unique within its task.
      query: what a retriever searches for.
      fields: values for the prompt template, by name.
      continuations: texts whose log-probability after the prompt is wanted, including a leading space.
      words: for each label, the words whose first tokens compete as the next token; () = none.
      gold: the correct answer, in the form that the task's metrics expect.
      accepted: correct answers, for display.
      source: the text that contains the answer, if the task provides it; such a question is used only if the text is
        in the training split.
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
        """The choices for display: each text, or the first word of each label."""
        return [text.strip() for text in (*self.continuations, *(group[0] for group in self.words))]


class Answer(NamedTuple):
    """One system's answer to one question, at one interpolation weight.

    Attributes:
      continuations_J: log-probability of each continuation, in nats.
      words: for each label, log-probabilities of its words as the next token, in nats.
      domain_words: the same after the task's domain prompt.
      text: the generated text, without the prompt; None if the task generates none.
    """

    continuations_J: np.ndarray
    words: Sequence[np.ndarray] = ()
    domain_words: Sequence[np.ndarray] = ()
    text: str | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """A task, defined as TASK in `tasks/NAME.py` or described by `tasks/NAME.toml` (see `tasks.find`).

    Attributes:
      title: display name.
      load: folder of data files -> {"test": questions} or {"test": ..., "validation": ...}. Without a validation
        split, the interpolation weight of each half of the questions is tuned on the other half.
      template: the prompt, with the names of `Question.fields` in braces.
      measure: (question, answer) -> {metric: value}.
      headline: the metric that tables show.
      tuned_on: the metric whose mean the interpolation weight maximizes; it must depend on log-probabilities only.
      max_new_tokens: maximum length of a generated text; 0 = no generation.
      stop: strings that end a generated text.
      background_template: the prompt with passages, which replace {passages}; "" = passages precede the prompt.
      domain: for tasks that compare words, the domain prompt of the domain-conditional PMI.
      single_tokens: whether words of several tokens are dropped; otherwise their first token is compared.
      hub: data sets on the Hugging Face hub, by file name in the folder.
      source: where the protocol comes from.
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
        """The prompt of a question, with passages if given."""
        if not passages:
            return self.template.format(**question.fields)
        numbered = " ".join(f"{number}. {passage}" for number, passage in enumerate(passages, start=1))
        if self.background_template:
            return self.background_template.format(passages=numbered, **question.fields)
        return f"Background: {numbered}\n\n{self.template.format(**question.fields)}"
