"""HaluEval's questions as open questions; `knowledge` is the passage that answers each (Li et al., 2023)."""

import dataclasses
import pathlib

from mlpmem_jax.comparison.question import Question
from mlpmem_jax.comparison.tasks import _files, _open, nq


def _load(folder: pathlib.Path) -> dict[str, list[Question]]:
    file = folder / "halueval" / "qa_one-turn_data.json"
    rows = _files.read_rows(file, ["knowledge", "question"], ["right_answer"])
    return {
        "test": [
            _open.question(file, number, row["question"], row["right_answer"], row["knowledge"])
            for number, row in enumerate(rows, start=1)
        ]
    }


TASK = dataclasses.replace(nq.TASK, title="HaluEval passages", load=_load, hub={})
