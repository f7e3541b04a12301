"""A corpus and questions that it answers: NQ-open with the Wikipedia passage that contains each answer.

For your own text, write JSON lines like `nq/nq-open-oracle.jsonl` in the data folder: `question`, `answers`, and
`ctxs`, a list whose first entry has the `text` that the corpus was built from.
"""

import dataclasses
import pathlib

from mlpmem_jax.comparison.question import Question
from mlpmem_jax.comparison.tasks import _files, _open, nq


def _load(folder: pathlib.Path) -> dict[str, list[Question]]:
    file = folder / "nq" / "nq-open-oracle.jsonl"
    rows = _files.read_rows(file, ["question", "answers", "ctxs"])
    return {
        "test": [
            _open.question(
                file, number, _open.with_question_mark(row["question"]), row["answers"], row["ctxs"][0]["text"]
            )
            for number, row in enumerate(rows, start=1)
        ]
    }


TASK = dataclasses.replace(nq.TASK, title="NQ passages", load=_load, hub={})
