"""WebQuestions (Berant et al., 2013): 2,032 test questions."""

import dataclasses
import pathlib

from mlpmem_jax.comparison.hub import DataSet
from mlpmem_jax.comparison.question import Question
from mlpmem_jax.comparison.tasks import _files, _open, triviaqa


def _load(folder: pathlib.Path) -> dict[str, list[Question]]:
    splits = {}
    for split in ("test", "validation"):
        file = folder / "webqs" / f"{split}.json"
        rows = _files.read_rows(file, ["qText"], ["answers"])
        splits[split] = [
            _open.question(file, number, row["qText"], row["answers"]) for number, row in enumerate(rows, start=1)
        ]
    return splits


def _data_set(split: str) -> DataSet:
    return DataSet("stanfordnlp/web_questions", split, columns={"qText": "question"})


TASK = dataclasses.replace(
    triviaqa.TASK,
    title="WebQuestions",
    load=_load,
    hub={"webqs/test.json": _data_set("test"), "webqs/validation.json": _data_set("train")},
)
