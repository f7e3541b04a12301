"""A corpus and the questions that it answers: NQ-open with the passage of Wikipedia that holds each answer.

Text of your own: JSON lines of `question`, `answers` and `ctxs`, a list whose first entry has the `text` that the
corpus was made from, as `nq/nq-open-oracle.jsonl` of the data folder.
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
