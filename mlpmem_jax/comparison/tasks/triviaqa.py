"""TriviaQA (Joshi et al., 2017), DPR's test set: 11,313 questions."""

import pathlib

from mlpmem_jax.comparison import metrics
from mlpmem_jax.comparison.hub import DataSet
from mlpmem_jax.comparison.question import Question, Task
from mlpmem_jax.comparison.tasks import _files, _open


def _load(folder: pathlib.Path) -> dict[str, list[Question]]:
    splits = {}
    for split in ("test", "validation"):
        file = folder / "triviaqa" / f"{split}.jsonl"
        rows = _files.read_rows(file, ["question"], ["answer"])
        splits[split] = [
            _open.question(file, number, row["question"], row["answer"]) for number, row in enumerate(rows, start=1)
        ]
    return splits


def _data_set(split: str) -> DataSet:
    # DPR's test set is the hub's validation split; DPR's validation set is part of the hub's training split.
    return DataSet("mandarjoshi/trivia_qa", split, "unfiltered.nocontext", {"answer": "answer.aliases"})


# A question mark is added to every question, even to those that have one, as in the reference.
TASK = Task(
    title="TriviaQA",
    load=_load,
    template="Answer the questions:\n\nQuestion: {question}? The answer is:",
    background_template=(
        "Refer to the background document and answer the question:\n\nBackground: {passages}\n\n"
        "Question: {question}? The answer is:"
    ),
    measure=metrics.open_answer,
    headline="token match",
    tuned_on="gold log-probability",
    max_new_tokens=100,
    stop=("\n", ".", ","),
    hub={"triviaqa/test.jsonl": _data_set("validation"), "triviaqa/validation.jsonl": _data_set("train")},
    source="prompt and token match of the reference's eval_webqa_triviaqa.py; passages as in the paper's appendix G",
)
