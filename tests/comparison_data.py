"""A small finished run, and files of tasks, for tests of the comparison."""

import contextlib
import csv
import itertools
import json

import jax
import pytest

from configs import smoke
from mlpmem_jax import stages
from mlpmem_jax.comparison import systems

TOWNS = itertools.product(("Ald", "Bren", "Cor", "Dun", "Eld", "Fal"), ("ford", "ham", "wick", "ton"))
PLACES = ["".join(parts) for parts in TOWNS]
RIVERS = ("Arrow", "Birch", "Cedar", "Dove", "Ember", "Finch", "Grove", "Heron")


def write_data(folder):
    """A corpus of passages, and the files of three tasks."""
    for name in ("nq", "pmi/rt", "truthfulqa"):
        (folder / name).mkdir(parents=True)
    rows = []
    for number, place in enumerate(PLACES):
        river = RIVERS[number % len(RIVERS)]
        text = f"{place} is a town on the river {river}. " * 4 + f"Its {number} mills were built long ago."
        rows.append(
            {"question": f"which river is {place} on", "answers": [river], "ctxs": [{"title": place, "text": text}]}
        )
    (folder / "nq/nq-open-oracle.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = {"fine": "positive", "dull": "negative"}
    reviews = [{"input": f"a {word} film", "output": label} for word, label in labels.items()]
    (folder / "pmi/rt/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in 3 * reviews))
    with (folder / "truthfulqa/TruthfulQA.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Question", "Best Answer", "Correct Answers", "Incorrect Answers"])
        for place in PLACES[:4]:
            writer.writerow([f"What is {place}?", "A town", "A town; A place on a river", "A river; A mill.; A king"])
    return folder


@contextlib.contextmanager
def one_device():
    """Of the devices of the tests the first alone."""
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *_: devices)
        patch.setattr(jax, "device_count", lambda *_: 1)
        yield


@contextlib.contextmanager
def small_run(folder, finished=("tokens", "base", "datastore", "targets", "train")):
    """The config of a run on one device, of which these stages are finished."""
    config = smoke.get_config()
    config.workdir = str(folder / "run")
    config.corpus.update({"source": "files", "path": str(write_data(folder / "data") / "nq/nq-open-oracle.jsonl")})
    config.corpus.update({"text_key": "ctxs.0.text", "max_bytes": 0, "group_key": "ctxs.0.title"})
    config.corpus.update({"validation_fraction": 0.15, "test_fraction": 0.15})
    config.tokenizer.vocab_size = 300
    config.base.update({"width": 16, "blocks": 2, "heads": 2, "context_length": 128})
    config.base.training.update({"steps": 4, "warmup_steps": 1, "batch_sequences": 1, "evaluate_every": 4})
    config.datastore.update({"batch_sequences": 1, "sequences_per_shard": 4, "input_depth": 0.5})
    config.targets.update({"k": 4, "temperature": 2.0, "backend": "exact", "quality_positions": 16})
    config.memory.update({"width": 16, "blocks": 1, "feed_forward_width": 64})
    config.training.update({"steps": 4, "warmup_steps": 1, "batch_sequences": 1, "evaluate_every": 4})
    config.mesh.fsdp = 1
    config.comparison.data = str(folder / "data")
    config.comparison.update({"tasks": "passages,rt,truthfulqa", "systems": ",".join(systems.SYSTEMS), "limit": 6})
    config.comparison.update({"passages": 2, "passage_words": 20})
    with one_device():
        for stage in finished:
            stages.run(stage, config)
        yield config
