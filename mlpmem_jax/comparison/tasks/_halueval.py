"""HaluEval (Li et al., 2023): is a text hallucinated, Yes or No?"""

from __future__ import annotations

import functools
import pathlib
import random

from mlpmem_jax.comparison import metrics
from mlpmem_jax.comparison.hub import DataSet
from mlpmem_jax.comparison.question import Answer, Question, Task
from mlpmem_jax.comparison.tasks import _files

_SEED = 0  # decides which of the two texts is shown; the official script sets no seed
_JUDGEMENTS = (" Yes", " No")


def task(title: str, name: str, fields: dict[str, str], right: str, hallucinated: str) -> Task:
    """One of the three tasks.

    Args:
      title: display name.
      name: the NAME in `halueval/NAME_evaluation_instruction.txt` (instructions) and `NAME_*data.json` (data).
      fields: label in the prompt -> field of the data.
      right, hallucinated: fields of the two texts; one of them is shown.
    """
    *given, judged = [f"#{label}#: " for label in fields]
    lines = [f"{label}{{{field}}}" for label, field in zip(given, fields.values(), strict=False)]
    return Task(
        title=title,
        load=functools.partial(_load, name, tuple(fields.values())[:-1], right, hallucinated),
        template="{instruction}\n\n" + "\n".join([*lines, f"{judged}{{shown}}", "#Your Judgement#:"]),
        measure=_measure,
        headline="accuracy",
        tuned_on="accuracy",
        max_new_tokens=16,
        hub={f"halueval/{name}_data.json": DataSet("pminervini/HaluEval", "data", name)},
        source="prompt and parsing of HaluEval's evaluate.py; accuracy compares p(Yes) with p(No)",
    )


def _load(name: str, given: tuple[str, ...], right: str, hallucinated: str, folder: pathlib.Path):
    folder = folder / "halueval"
    instruction = _files.read_text(folder / f"{name}_evaluation_instruction.txt")
    file = next((file for file in (folder / f"{name}_data.json", folder / f"{name}_one-turn_data.json")
                 if file.exists()), folder / f"{name}_data.json")  # fmt: skip
    rows = _files.read_rows(file, [*given, right, hallucinated])
    sides = random.Random(_SEED)
    questions = []
    for number, row in enumerate(rows, start=1):
        is_right = sides.random() <= 0.5
        fields = {field: row[field] for field in given}
        questions.append(
            Question(
                id=str(number),
                query=" ".join(fields.values())[-1000:],
                fields={**fields, "instruction": instruction, "shown": row[right if is_right else hallucinated]},
                continuations=_JUDGEMENTS,
                gold=int(is_right),
                accepted=(_JUDGEMENTS[is_right].strip(),),
            )
        )
    return {"test": questions}


def _measure(question: Question, answer: Answer) -> dict[str, float]:
    measures = metrics.yes_or_no(question, answer)
    if answer.text is not None:
        text = answer.text.replace(".", "")
        is_said = [judgement.strip() in text for judgement in _JUDGEMENTS]
        measures["accuracy of the text"] = float(sum(is_said) == 1 and is_said[question.gold])
    return measures
