"""Tasks, described by TOML files, that choose a label by words that stand for it.

title = "RTE"
source = "prompts of knnlm-limits"
file = "pmi/rte/val.jsonl"
fields = ["premise", "hypothesis"]           # fields of a row, for the prompt
prompt = " {premise}\\nquestion: {hypothesis} true or false?\\nanswer:"
domain = "true or false?\\nanswer:"
label = "label"                              # field with the label
labels = ["entailment", "not_entailment"]    # its values, in the order of the words
words = [["true", "yes"], ["false", "no"]]   # or: word_file = "pmi/label_names_sentidict.txt", one line per label

Optional: dropped (labels whose rows are dropped), strip (whether to strip whitespace from fields), first_words (words
that precede those of word_file), single_tokens (whether to drop words of several tokens; otherwise their first token is
compared), hub (where to download the file, see `comparison.hub`), like (a task that provides the keys not given here).
"""

from __future__ import annotations

import functools
import json
import pathlib
import tomllib

from mlpmem_jax.comparison import metrics
from mlpmem_jax.comparison.hub import DataSet
from mlpmem_jax.comparison.question import Question, Task
from mlpmem_jax.comparison.tasks import _files
from mlpmem_jax.core.errors import UserError

_REQUIRED = ("title", "source", "file", "fields", "prompt", "domain", "label", "labels")


def read(file: pathlib.Path) -> Task:
    """The task that a file describes.

    Raises:
      UserError: the file lacks a key.
    """
    described = _described(file)
    if missing := [key for key in _REQUIRED if key not in described]:
        raise UserError(f"{file}: has no {missing[0]!r}; docs/extending.md shows a whole task")
    hub = {described["file"]: DataSet(**described["hub"])} if "hub" in described else {}
    return Task(
        title=described["title"],
        load=functools.partial(_load, described),
        template=described["prompt"],
        measure=metrics.domain_pmi,
        headline="accuracy",
        tuned_on="accuracy",
        domain=described["domain"],
        single_tokens=described.get("single_tokens", False),
        hub=hub,
        source=described["source"],
    )


def _described(file: pathlib.Path) -> dict:
    described = tomllib.loads(file.read_text())
    if "like" not in described:
        return described
    other = _described(file.with_name(f"{described['like']}.toml"))
    if "word_file" in described:
        other.pop("words", None)
    return other | described


def _load(described: dict, folder: pathlib.Path) -> dict[str, list[Question]]:
    file = folder / described["file"]
    rows = _files.read_rows(file, [], [*described["fields"], described["label"]])
    words = _label_words(described, folder)
    labels = [group if isinstance(group, list) else [group] for group in described["labels"]]
    questions = []
    for number, row in enumerate(rows, start=1):
        label = str(row[described["label"]])
        if label in described.get("dropped", []):
            continue
        gold = [index for index, group in enumerate(labels) if label in group]
        if not gold:
            raise UserError(f"{file}: row {number} has the label {label!r}; expected one of {described['labels']}")
        fields = {name: str(row[name]) for name in described["fields"]}
        if described.get("strip"):
            fields = {name: value.strip() for name, value in fields.items()}
        query = " ".join(fields.values())
        questions.append(Question(id=str(number), query=query, fields=fields, words=words, gold=gold[0]))
    return {"test": questions}


def _label_words(described: dict, folder: pathlib.Path) -> tuple[tuple[str, ...], ...]:
    """The words of each label, each with a leading space; lists from a file are trimmed to the shortest."""
    if "words" in described:
        groups = described["words"]
    else:
        groups = _groups(folder / described["word_file"])
        if len(groups) != len(described["labels"]):
            raise UserError(
                f"{folder / described['word_file']}: has {len(groups)} lines of words but there are "
                f"{len(described['labels'])} labels"
            )
        shortest = min(map(len, groups))
        first = described.get("first_words", [[]] * len(groups))
        groups = [[*own, *group[:shortest]] for own, group in zip(first, groups, strict=True)]
    return tuple(tuple(f" {word}" for word in group) for group in groups)


def _groups(file: pathlib.Path) -> list[list[str]]:
    """The words of each label: a comma-separated line, or a list in a JSON object."""
    text = _files.read_text(file)
    if file.suffix == ".json":
        return list(json.loads(text).values())
    lines = text.strip().splitlines()
    return [[word.strip() for word in line.split(",") if word.strip()] for line in lines if line.strip()]
