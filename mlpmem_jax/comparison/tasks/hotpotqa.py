"""HotpotQA (Yang et al., 2018), distractor split, closed book: 7,405 questions of the development set."""

import dataclasses
import pathlib

from mlpmem_jax.comparison.hub import DataSet
from mlpmem_jax.comparison.question import Question
from mlpmem_jax.comparison.tasks import _files, _open, nq


def _load(folder: pathlib.Path) -> dict[str, list[Question]]:
    file = folder / "hotpotqa" / "dev.json"
    rows = _files.read_rows(file, ["question"], ["answer"])
    return {
        "test": [
            _open.question(file, number, _open.with_question_mark(row["question"]), row["answer"])
            for number, row in enumerate(rows, start=1)
        ]
    }


TASK = dataclasses.replace(
    nq.TASK,
    title="HotpotQA",
    load=_load,
    hub={"hotpotqa/dev.json": DataSet("hotpotqa/hotpot_qa", "validation", "distractor")},
)
