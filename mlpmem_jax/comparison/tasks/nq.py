"""Natural Questions, open domain (Kwiatkowski et al., 2019; Lee et al., 2019): the 3,610 development questions."""

import pathlib

from mlpmem_jax.comparison import metrics
from mlpmem_jax.comparison.hub import DataSet
from mlpmem_jax.comparison.question import Question, Task
from mlpmem_jax.comparison.tasks import _files, _open


def _load(folder: pathlib.Path) -> dict[str, list[Question]]:
    splits = {}
    for split in ("test", "validation"):
        file = folder / "nq" / f"{split}.jsonl"
        rows = _files.read_rows(file, ["question"], ["answer"])
        # The reference leaves out the row whose answer is a lone parenthesis.
        splits[split] = [
            _open.question(file, number, _open.with_question_mark(row["question"]), row["answer"])
            for number, row in enumerate(rows, start=1)
            if row["answer"] != [")"]
        ]
    return splits


TASK = Task(
    title="NQ",
    load=_load,
    template="Answer these questions:\nQuestion: {question}\nAnswer:",
    background_template=(
        "Refer to the background document and answer the question:\n\nBackground: {passages}\n\n"
        "Question: {question}\nAnswer:"
    ),
    measure=metrics.open_answer,
    headline="exact match",
    tuned_on="gold log-probability",
    max_new_tokens=15,
    stop=("\n",),
    hub={
        "nq/test.jsonl": DataSet("google-research-datasets/nq_open", "validation"),
        "nq/validation.jsonl": DataSet("google-research-datasets/nq_open", "train"),
    },
    source="prompt and exact match of the reference's eval_qa.py; passages as in the paper's appendix G",
)
