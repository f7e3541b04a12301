"""`mlpmem compare`: runs every system on every task and writes one page with scores and costs.

It loads the tasks, trains the systems that need training, scores all questions, tunes interpolation weights on
questions other than the reported ones, and generates texts. It writes to WORKDIR/comparison:

    answers.jsonl    every question, with every system's answer and metrics
    compare.json     all results
    index.html       the page
"""

from __future__ import annotations

import json
import pathlib
import re

import jax
import ml_collections
import numpy as np
from etils import epath

from mlpmem_jax.comparison import differences, greedy, hub, metrics, page, scores, systems, tasks, weights
from mlpmem_jax.comparison.costs import cost
from mlpmem_jax.comparison.passages import check_retriever, documents
from mlpmem_jax.comparison.question import Question, Task
from mlpmem_jax.comparison.reading import read
from mlpmem_jax.comparison.systems import SIDE_MODEL, SYSTEMS, System, Workdir
from mlpmem_jax.core import stage_costs
from mlpmem_jax.core.errors import ConfigError
from mlpmem_jax.core.progress import say
from mlpmem_jax.corpus.tokens import read_tokenizer
from mlpmem_jax.evaluation import provenance
from mlpmem_jax.training import controls, lora


def run(config: ml_collections.ConfigDict) -> dict:
    """Compares the systems of `config.comparison`.

    Returns:
      The contents of compare.json.

    Raises:
      UserError: a stage is not finished, a task or system is unknown, or a task's file is missing.
    """
    settings = config.comparison
    chosen = systems.parse(settings.systems)
    chosen_tasks = {name: tasks.find(name) for name in settings.tasks.split(",") if name}
    if not chosen_tasks:
        raise ConfigError(f"config.comparison.tasks: is empty; expected some of {', '.join(tasks.names())}")
    data = pathlib.Path(settings.data)
    if settings.hub:
        for task in chosen_tasks.values():
            hub.fetch(data, task.hub)
    splits = {name: task.load(data) for name, task in chosen_tasks.items()}  # before any compute
    if any(SYSTEMS[name].retrieves for name in chosen):
        check_retriever(settings.retriever)
    workdir = Workdir(config)
    _train_missing(config, chosen)
    artifacts = {name: workdir.parts(SYSTEMS[name]) for name in chosen}
    texts = documents(workdir.tokens) if any(q.source for split in splits.values() for q in split["test"]) else []

    folder, results, answers = workdir.results, {}, []
    seconds = dict.fromkeys(chosen, 0.0)
    for name, task in chosen_tasks.items():
        say(f"== {name}: {task.title}")
        questions = _known(splits[name]["test"], texts, name)
        result, lines = _TaskComparison(workdir, name, task, chosen, artifacts, seconds).run(
            _sample(questions, settings.limit, settings.seed),
            _sample(splits[name].get("validation", []), settings.tuning_questions, settings.seed),
        )
        results[name] = result
        answers += lines
    comparison = {
        "systems": {name: {"title": SYSTEMS[name].title, **_cost(workdir, name, artifacts[name], seconds[name])}
                    for name in chosen},
        "tasks": results,
        "grid": weights.GRID.tolist(),
        "confidence": config.evaluation.confidence,
        "config": json.loads(config.to_json_best_effort()),
        "provenance": provenance.environment(
            {f"{role} of {name}": artifact for name in chosen for role, artifact in artifacts[name].items()}
        ),
    }  # fmt: skip
    if jax.process_index() == 0:
        _write(folder, comparison, answers)
    say(f"comparison: {folder / 'index.html'}")
    return comparison


def _cost(workdir: Workdir, name: str, artifacts: dict, seconds: float) -> dict:
    passages_bytes = workdir.retriever.bytes if SYSTEMS[name].retrieves else 0
    return cost(workdir.config, artifacts, seconds, passages_bytes)


def _train_missing(config: ml_collections.ConfigDict, chosen: list[str]) -> None:
    """Trains the language models that the chosen systems need, unless they are finished."""
    for model, train in (("continued", controls.continued), ("lora", lora.run)):
        if any(SYSTEMS[name].model == model for name in chosen):
            with stage_costs.measured(config.workdir, systems.FOLDERS[model]):
                train(config)


def _known(questions: list[Question], texts: list[str], name: str) -> list[Question]:
    """The questions whose source passage is in the training text; all questions of a task without source passages.

    Raises:
      ConfigError: none of the passages is in the training text.
    """
    if not questions[0].source:
        return questions
    whole = "\n".join(texts)
    known = [question for question in questions if question.source.strip() in whole]
    if not known:
        raise ConfigError(
            f"comparison task {name!r}: none of its {len(questions)} passages is in the training text; this task "
            "needs a corpus that was built from the same passages"
        )
    say(f"{name}: {len(known)} of {len(questions)} questions have a passage in the training split; only these are used")
    return known


def _sample(questions: list[Question], limit: int, seed: int) -> list[Question]:
    """A random sample of `limit` questions, in their original order; all of them for a limit of 0."""
    if not limit or limit >= len(questions):
        return questions
    chosen = np.random.default_rng(seed).choice(len(questions), limit, replace=False)
    return [questions[index] for index in sorted(chosen)]


class _TaskComparison:
    """Runs one task: scores and texts of every system, and their summary."""

    def __init__(self, workdir: Workdir, name: str, task: Task, chosen: list[str], artifacts, seconds: dict):
        self._workdir, self._name, self._task, self._chosen = workdir, name, task, chosen
        self._artifacts, self._seconds = artifacts, seconds
        self._settings, self._folder = workdir.config.comparison, workdir.results
        self._tokenizer = read_tokenizer(workdir.tokens)
        self._file_name = re.sub(r"[^\w.+-]", "_", name)  # the name may be the path of a file
        self._scored: dict[tuple, dict[str, scores.Values]] = {}
        self._unmixed: dict[tuple, tuple[list[str], float]] = {}  # texts and seconds of systems without a side

    def run(self, questions: list[Question], tuning: list[Question]) -> tuple[dict, list[dict]]:
        """(results of the task, one record per question)."""
        encoded = {retrieves: self._encode(questions, retrieves) for retrieves in self._variants()}
        encoded_tuning = (
            {retrieves: self._encode(tuning, retrieves) for retrieves in self._variants()} if tuning else None
        )
        results = {name: self._system(name, encoded, encoded_tuning) for name in self._chosen}
        lines = [
            {
                "task": self._name,
                "id": question.id,
                "prompt": encoded[False].prompts[number],
                "gold": question.gold,
                "accepted": list(question.accepted),
                "systems": {
                    name: {
                        "weight": float(weights.GRID[of["chosen"][number]]) if SYSTEMS[name].side else None,
                        "text": of["texts"][number],
                        "scores": of["scores"][number],
                        **{measure: values[number] for measure, values in of["measures"].items()},
                    }
                    for name, of in results.items()
                },
            }
            for number, question in enumerate(questions)
        ]
        return self._summary(results, encoded, bool(tuning)), lines

    def _variants(self) -> list[bool]:
        """The values of "prompts have passages" to run: False, and True if a chosen system retrieves."""
        return [False, True] if any(SYSTEMS[name].retrieves for name in self._chosen) else [False]

    def _encode(self, questions: list[Question], retrieves: bool) -> scores.EncodedQuestions:
        passages = None
        if retrieves:
            queries = [question.query for question in questions]
            passages = self._workdir.retriever.retrieve(queries, self._settings.passages)
        context = self._workdir.model(SIDE_MODEL).config.context_length
        encoded = scores.encode_questions(self._task, questions, passages, scores.encoder(self._tokenizer), context)
        if encoded.truncated:
            say(f"{self._name}: {encoded.truncated} prompts exceed {context} tokens and are truncated on the left")
        return encoded

    def _values(
        self, model: str, retrieves: bool, encoded: scores.EncodedQuestions, split: str
    ) -> dict[str, scores.Values]:
        """Scores of a language model and of the sides that read its hidden states, computed or loaded once."""
        key = model, retrieves, split
        if key not in self._scored:
            mixed = {SYSTEMS[name].side for name in self._chosen if SYSTEMS[name].retrieves == retrieves} - {""}
            sides = sorted(mixed) if model == SIDE_MODEL else []
            inputs = {f"{name} {role}": artifact.fingerprint for name in self._chosen for role, artifact
                       in self._artifacts[name].items()
                       if SYSTEMS[name].model == model or SYSTEMS[name].side in sides}  # fmt: skip
            inputs |= {"search": self._workdir.search_settings, "sides": ",".join(sides)}
            file = self._folder / "scores" / f"{self._file_name}-{split}-{model}{'-rag' if retrieves else ''}.npz"

            def compute() -> tuple[dict[str, scores.Values], dict[str, float]]:
                read_sides = {side: self._workdir.side(side) for side in sides}
                title = f"{self._name}/{split}, {model}{' with passages' if retrieves else ''}"
                return read(self._workdir.model(model), encoded.rows, read_sides, self._workdir.sharding, title)

            self._scored[key], seconds = scores.cached_scores(file, scores.fingerprint(encoded, inputs), compute)
            for name in self._chosen:
                self._seconds[name] += sum(seconds[part] for part in _parts_of(SYSTEMS[name], model, retrieves))
        return self._scored[key]

    def _grid_values(self, system: System, encoded: scores.EncodedQuestions, split: str) -> np.ndarray:
        """The metric that weights are tuned on, float [Z, N]; Z is 1 without a side."""
        model, side = self._of_system(system, encoded, split)
        grid = weights.GRID if side is not None else [0.0]

        def measure(number: int, weight: float) -> float:
            answer = scores.answer(encoded, number, model, side, weight)
            return self._task.measure(encoded.questions[number], answer)[self._task.tuned_on]

        return weights.over_grid(measure, len(encoded.questions), grid)

    def _of_system(
        self, system: System, encoded: scores.EncodedQuestions, split: str
    ) -> tuple[scores.Values, scores.Values | None]:
        model = self._values(system.model, system.retrieves, encoded, split)["model"]
        if not system.side:
            return model, None
        return model, self._values(SIDE_MODEL, system.retrieves, encoded, split)[system.side]

    def _system(self, name: str, encoded: dict, encoded_tuning: dict | None) -> dict:
        system, mine = SYSTEMS[name], encoded[SYSTEMS[name].retrieves]
        grid_ZxN = self._grid_values(system, mine, "test")
        tuning_values = (
            self._grid_values(system, encoded_tuning[system.retrieves], "validation") if encoded_tuning else None
        )
        chosen_N = weights.tuned(grid_ZxN, tuning_values, self._settings.seed)
        texts = self._texts(name, mine, chosen_N) if self._task.max_new_tokens else None
        model, side = self._of_system(system, mine, "test")
        answers = [
            scores.answer(mine, number, model, side, weights.GRID[chosen_N[number]], texts and texts[number])
            for number in range(len(mine.questions))
        ]
        measured = [self._task.measure(*pair) for pair in zip(mine.questions, answers, strict=True)]
        compared = [metrics.choice_scores(answer) for answer in answers]
        choices = [question.choices[int(np.argmax(of))] for question, of in zip(mine.questions, compared, strict=True)]
        return {
            "chosen": chosen_N,
            "grid": grid_ZxN,
            "texts": texts or choices,  # without generation, the answer is the chosen text
            "scores": [of.tolist() for of in compared],
            "measures": {measure: [one[measure] for one in measured] for measure in measured[0]},
        }

    def _texts(self, name: str, encoded: scores.EncodedQuestions, chosen_N: np.ndarray) -> list[str]:
        system = SYSTEMS[name]
        end_token = self._workdir.tokens.summary["end_of_text_id"]
        ending = greedy.Ending(self._tokenizer, end_token, self._task.stop)
        # At lambda 0 a system writes what its language model writes.
        unmixed, its_seconds = self._unmixed.get((system.model, system.retrieves), (None, 0.0))

        def compute() -> list[str]:
            side = self._workdir.side(system.side) if system.side else None
            decoder, side_decoder = self._workdir.decoders(system, side)
            texts = list(unmixed or [""] * len(encoded.questions))
            for index in np.unique(chosen_N):
                numbers = np.flatnonzero(chosen_N == index)
                weight = float(weights.GRID[index])
                if unmixed and not weight:
                    continue
                generated = greedy.generate(
                    decoder,
                    side_decoder if weight else None,
                    weight,
                    [encoded.prompt_ids[number] for number in numbers],
                    self._task.max_new_tokens,
                    ending.is_reached,
                    f"{self._name}, {name}" + (f" (lambda {weight:.2f})" if side else ""),
                )
                for number, ids in zip(numbers, generated, strict=True):
                    texts[number] = ending.text(ids).strip()
            return texts

        inputs = {role: artifact.fingerprint for role, artifact in self._artifacts[name].items()}
        inputs |= {"weights": ",".join(map(str, chosen_N)), "search": self._workdir.search_settings}
        inputs |= {"ending": repr((self._task.max_new_tokens, end_token, self._task.stop))}
        file = self._folder / "texts" / f"{self._file_name}-{name}.json"
        texts, seconds = scores.cached_texts(file, scores.fingerprint(encoded, inputs), compute)
        if not system.side:
            self._unmixed[system.model, system.retrieves] = texts, seconds
        self._seconds[name] += seconds + its_seconds * float(np.mean(weights.GRID[chosen_N] == 0))
        return texts

    def _summary(self, results: dict, encoded: dict, has_validation: bool) -> dict:
        confidence = self._workdir.config.evaluation.confidence
        base, count = results["base"]["measures"], len(encoded[False].questions)
        of_systems = {}
        for name, of in results.items():
            chosen_N = of["chosen"]
            of_systems[name] = {
                "measures": {measure: float(np.mean(values)) for measure, values in of["measures"].items()},
                "over base": {
                    measure: differences.paired_interval(
                        np.subtract(values, base[measure]), confidence, self._settings.seed
                    )
                    for measure, values in of["measures"].items()
                    if name != "base"
                },
                "weights": sorted({float(weights.GRID[index]) for index in chosen_N}) if SYSTEMS[name].side else [],
                "curve": of["grid"].mean(axis=1).tolist() if SYSTEMS[name].side else [],
                "tuned on what is reported": float(of["grid"].mean(axis=1).max()),
            }
        return {
            "title": self._task.title,
            "source": self._task.source,
            "questions": count,
            "headline": self._task.headline,
            "tuned on": self._task.tuned_on,
            "weights from": "the validation split" if has_validation else "the other half of the questions",
            "truncated prompts": {("with passages" if key else "plain"): one.truncated for key, one in encoded.items()},
            "systems": of_systems,
            "differences": {
                measure: differences.of_pairs(
                    {name: of["measures"][measure] for name, of in results.items()}, confidence, self._settings.seed
                )
                for measure in dict.fromkeys((self._task.headline, self._task.tuned_on))
            },
        }


def _parts_of(system: System, model: str, retrieves: bool) -> list[str]:
    """The parts of a language model's scores that a system needs; every system that shares a part is charged for it."""
    if system.retrieves != retrieves:
        return []
    reads = system.model == model or (system.side and model == SIDE_MODEL)
    return [*(["model"] if reads else []), *([system.side] if system.side and model == SIDE_MODEL else [])]


def _write(folder: epath.Path, comparison: dict, answers: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in answers)
    (folder / "answers.jsonl").write_bytes(lines.encode())
    (folder / "compare.json").write_text(json.dumps(comparison, indent=1) + "\n")
    page.write(folder)
