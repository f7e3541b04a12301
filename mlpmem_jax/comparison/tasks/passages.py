"""A corpus and questions that it answers: NQ-open with the Wikipedia passage that contains each answer.

For your own text, write JSON lines like `nq/nq-open-oracle.jsonl` in the data folder: `question`, `answers`, and
`ctxs`, a list whose first entry has the `text` that the corpus was built from.
"""

import dataclasses
import pathlib

from mlpmem_jax.comparison.question import Question
from mlpmem_jax.comparison.tasks import _files, _open, nq
from mlpmem_jax.core.errors import UserError


def _load(folder: pathlib.Path) -> dict[str, list[Question]]:
    file = folder / "nq" / "nq-open-oracle.jsonl"
    rows = _files.read_rows(file, ["question"], ["answers", "ctxs"])
    return {
        "test": [
            _open.question(
                file,
                number,
                _open.with_question_mark(row["question"]),
                row["answers"],
                _passage(file, number, row["ctxs"]),
            )
            for number, row in enumerate(rows, start=1)
        ]
    }


def _passage(file: pathlib.Path, number: int, passages) -> str:
    try:
        text = passages[0]["text"]
    except (LookupError, TypeError):
        text = None
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{file}: row {number}: expected 'ctxs' to be a list whose first entry has a 'text'")
    return text


TASK = dataclasses.replace(nq.TASK, title="NQ passages", load=_load, hub={})
