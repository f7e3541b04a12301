"""Scores of one task: log-probabilities of every language model and side on every question, computed once and cached.

    WORKDIR/comparison/scores/TASK-SPLIT-MODEL[-rag].npz    log-probabilities of one model and its sides, for all rows
    WORKDIR/comparison/texts/TASK-SYSTEM.json               generated texts of one system

Each file stores a fingerprint of its inputs and is recomputed when that changes. So a comparison that was killed
resumes where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
import tokenizers
from etils import epath

from mlpmem_jax.comparison.packing import Row
from mlpmem_jax.comparison.question import Answer, Question, Task
from mlpmem_jax.core.errors import ConfigError
from mlpmem_jax.models.interpolation import mixture_log_probabilities
from mlpmem_jax.retrieval.scratch import write_whole

Values = list[np.ndarray]
"""Log-probabilities [P, J] of every row."""

_DAMAGED = (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)
"""What reading a truncated or changed file raises."""


@dataclasses.dataclass(frozen=True)
class EncodedQuestions:
    """The questions of a task as token ids, with or without passages in front.

    Attributes:
      questions: the N questions.
      prompts: the text of each prompt.
      prompt_ids: the token ids of each prompt, truncated on the left where it was too long.
      rows: the rows of all questions, followed by that of the domain prompt if there is one.
      row_of: the row numbers of each question.
      truncated: the number of prompts that were too long.
    """

    questions: Sequence[Question]
    prompts: list[str]
    prompt_ids: list[list[int]]
    rows: list[Row]
    row_of: list[list[int]]
    truncated: int

    @property
    def domain_row(self) -> int:
        """The number of the domain prompt's row, which is the last."""
        return len(self.rows) - 1


def encode_questions(
    task: Task,
    questions: Sequence[Question],
    passages: Sequence[Sequence[str]] | None,
    encode: Callable[[list[str]], list[list[int]]],
    context_length: int,
) -> EncodedQuestions:
    """Encodes the questions of a task for scoring.

    Args:
      task: the task that provides the prompts.
      questions: the questions to encode.
      passages: the passages for each question; None = none.
      encode: texts -> token ids of each text.
      context_length: maximum tokens of a prompt plus its continuation; longer prompts are truncated on the left.

    Raises:
      ConfigError: a label has no token, or the context has no room for a prompt.
    """
    room = context_length - task.max_new_tokens
    if room < 1:
        raise ConfigError(
            f"{task.title}: the task generates {task.max_new_tokens} tokens, which leaves no room for a prompt in "
            f"a context of {context_length} tokens"
        )
    words = _first_tokens(questions, encode, task.single_tokens)
    if task.single_tokens:
        questions = _with_known_words(questions, words)
    prompts = [task.prompt(question, passages[n] if passages else ()) for n, question in enumerate(questions)]
    prompt_ids = encode(prompts)
    wholes = iter(encode([p + text for p, q in zip(prompts, questions, strict=True) for text in q.continuations]))
    rows, row_of, truncated = [], [], 0
    for question, ids in zip(questions, prompt_ids, strict=True):
        own = [Row.of_continuation(ids, next(wholes)) for _ in question.continuations]
        if len(own) > 1 and all(len(row.positions_P) == 1 and row.tokens_T == own[0].tokens_T for row in own):
            own = [Row(own[0].tokens_T, own[0].positions_P, [[row.ids_PxJ[0][0] for row in own]])]
        if question.words:
            own.append(Row.of_next(ids, [words[word] for group in question.words for word in group]))
        truncated += any(len(row.tokens_T) > context_length for row in own)
        row_of.append(list(range(len(rows), len(rows) + len(own))))
        rows += [row.truncated(context_length) for row in own]
    if task.domain:
        ids = [words[word] for group in questions[0].words for word in group]
        rows.append(Row.of_next(encode([task.domain])[0], ids))
    return EncodedQuestions(questions, prompts, [ids[-room:] for ids in prompt_ids], rows, row_of, truncated)


def _first_tokens(questions: Sequence[Question], encode, single: bool) -> dict[str, int]:
    """{word: its first token} for all words that are compared; with `single`, only for words that are one token.

    Raises:
      ConfigError: the tokenizer has no token for a word.
    """
    words = list(dict.fromkeys(word for question in questions for group in question.words for word in group))
    if not words:
        return {}
    # Within a text: at its beginning Llama 2's tokenizer has a token for the space alone, the same for every word.
    before = "a"
    begin = len(encode([before])[0])
    tokens = {word: ids[begin:] for word, ids in zip(words, encode([before + word for word in words]), strict=True)}
    if lacking := [word for word, ids in tokens.items() if not ids]:
        raise ConfigError(f"the tokenizer has no token for the word {lacking[0]!r} of a label")
    return {word: ids[0] for word, ids in tokens.items() if not single or len(ids) == 1}


def _with_known_words(questions: Sequence[Question], known: Mapping[str, int]) -> list[Question]:
    """The questions, keeping only words that have a token.

    Raises:
      ConfigError: a label has no word left.
    """

    @functools.cache
    def kept(groups: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
        left = tuple(tuple(word for word in group if word in known) for group in groups)
        for group, of_label in zip(groups, left, strict=True):
            if not of_label:
                words = ", ".join(group)[:200]
                raise ConfigError(f"the tokenizer has no single token for any word of a label: {words}")
        return left

    return [dataclasses.replace(question, words=kept(question.words)) for question in questions]


def answer(
    encoded: EncodedQuestions, number: int, model: Values, side: Values | None, weight: float, text: str | None = None
) -> Answer:
    """The answer of a mixture to one question.

    Args:
      encoded: the encoded questions.
      number: the question's index.
      model: log-probabilities of the language model.
      side: log-probabilities of what is mixed in; None = nothing.
      weight: lambda of the side.
      text: the generated text, if any.
    """

    def mixed(row: int) -> np.ndarray:
        if side is None:
            return np.asarray(model[row], np.float64)
        return mixture_log_probabilities(model[row], side[row], weight)

    question, rows = encoded.questions[number], list(encoded.row_of[number])
    words = domain_words = ()
    if question.words:
        ends = np.cumsum([len(group) for group in question.words])[:-1]
        words = np.split(mixed(rows.pop())[0], ends)
        domain_words = np.split(mixed(encoded.domain_row)[0], ends)
    if len(rows) == 1 and len(question.continuations) > 1:
        continuations_J = mixed(rows[0])[0]
    else:
        continuations_J = np.array([mixed(row).sum() for row in rows])
    return Answer(continuations_J, words, domain_words, text)


def fingerprint(encoded: EncodedQuestions, inputs: Mapping[str, str]) -> str:
    """A fingerprint of everything that scores depend on: the rows, and named fingerprints of artifacts and settings."""
    digest = hashlib.sha256(json.dumps(dict(sorted(inputs.items()))).encode())
    for row in encoded.rows:
        digest.update(np.asarray(row.tokens_T, np.int32).tobytes())
        digest.update(json.dumps([list(row.positions_P), [list(ids) for ids in row.ids_PxJ]]).encode())
    for ids in encoded.prompt_ids:
        digest.update(np.asarray(ids, np.int32).tobytes())
    return digest.hexdigest()


def cached_scores(
    file: epath.Path, inputs: str, compute: Callable[[], tuple[dict[str, Values], dict[str, float]]]
) -> tuple[dict[str, Values], dict[str, float]]:
    """Values and seconds of `compute`, by source; from the file if it is whole and its inputs are unchanged."""
    if file.exists():
        with contextlib.suppress(*_DAMAGED), np.load(io.BytesIO(file.read_bytes())) as kept:
            if str(kept["made_of"]) == inputs:
                sources = json.loads(str(kept["sources"]))
                values = {source: _unpacked(kept, source) for source in sources}
                return values, dict(zip(sources, kept["seconds"].tolist(), strict=True))
    computed, seconds = compute()
    arrays = {
        "made_of": np.array(inputs),
        "sources": np.array(json.dumps(list(computed))),
        "seconds": np.array([seconds[source] for source in computed]),
    }
    for source, values in computed.items():
        arrays[f"{source}_values"] = np.concatenate([array.ravel() for array in values]).astype(np.float64)
        arrays[f"{source}_shapes"] = np.array([array.shape for array in values])
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    _keep(file, content.getvalue())
    return computed, seconds


def _unpacked(kept, source: str) -> Values:
    shapes = kept[f"{source}_shapes"]
    ends = np.cumsum(shapes.prod(axis=1))[:-1]
    parts = np.split(kept[f"{source}_values"], ends)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def cached_texts(file: epath.Path, inputs: str, compute: Callable[[], list[str]]) -> tuple[list[str], float]:
    """(result of `compute`, the seconds it took), loaded from the file if it is whole and its inputs are unchanged."""
    if file.exists():
        with contextlib.suppress(*_DAMAGED):
            kept = json.loads(file.read_bytes())
            if kept["made_of"] == inputs:
                return kept["texts"], kept["seconds"]
    start = time.perf_counter()
    texts = compute()
    seconds = time.perf_counter() - start
    content = {"made_of": inputs, "seconds": seconds, "texts": texts}
    _keep(file, json.dumps(content, ensure_ascii=False).encode())
    return texts, seconds


def _keep(file: epath.Path, content: bytes) -> None:
    if jax.process_index() == 0:
        write_whole(file, content)


def encoder(tokenizer: tokenizers.Tokenizer) -> Callable[[list[str]], list[list[int]]]:
    """A function from texts to their token ids, including special tokens that the tokenizer puts in front."""

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch(texts)] if texts else []

    return encode
