"""`mlpmem score`: runs tasks of lm-evaluation-harness on the systems of a working directory (extra `harness`).

The harness provides prompts and metrics; this module provides the model. Systems with passages in their prompts cannot
be scored this way: the harness passes prompts, not the questions to search with.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import jax
import ml_collections
import rich.console
import rich.table

from mlpmem_jax.comparison import greedy, systems
from mlpmem_jax.comparison.packing import Row
from mlpmem_jax.comparison.reading import read_mixture
from mlpmem_jax.comparison.systems import SIDE_MODEL, SYSTEMS, Workdir
from mlpmem_jax.core.errors import ConfigError, UserError, require
from mlpmem_jax.core.progress import say
from mlpmem_jax.corpus import tokenizer
from mlpmem_jax.corpus.tokens import read_tokenizer
from mlpmem_jax.inference.weight import find_weight, read_report

PREFIX = "lm_eval:"
_MOST_NEW_TOKENS = 256  # default for tasks that set no limit


class Answering:
    """A system at one interpolation weight, with the operations that the harness needs."""

    def __init__(self, workdir: Workdir, name: str, weight: float):
        system = SYSTEMS[name]
        self.name, self._workdir, self._weight = name, workdir, weight
        self._model = workdir.model(system.model)
        self._side = workdir.side(system.side) if system.side else None
        self._tokenizer = read_tokenizer(workdir.tokens)
        self.end = workdir.tokens.summary["end_of_text_id"]
        self._begin = tokenizer.begin_ids(self._tokenizer)
        self.prefix = next(iter(self._begin), self.end)  # of a text without a context; the exported model's "bos_token"
        self.context_length = self._model.config.context_length

    def encode(self, text: str, begins: bool = True) -> list[int]:
        """Token ids; if it `begins` a text, including any special tokens that the tokenizer puts in front."""
        return [*(self._begin if begins else []), *tokenizer.encode(self._tokenizer, [text])[0].tolist()]

    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding would produce it) for each (context, continuation) of token ids."""
        rows = [
            Row.of_continuation(context, [*context, *continuation]).truncated(self.context_length)
            for context, continuation in pairs
        ]
        read = read_mixture(self._model, rows, self._side, self._weight, self._workdir.sharding, self.name)
        return [(float(values.sum()), bool(likeliest.all())) for values, likeliest in read]

    def write(self, prompts: Sequence[str], stops: Sequence[str], count: int) -> list[str]:
        """Greedy continuations of texts, up to but not including the first of `stops`."""
        ending = greedy.Ending(self._tokenizer, self.end, stops)
        decoder = greedy.Decoder(self._model, self._side, self._workdir.sharding)
        ids = [(self.encode(prompt) or [self.prefix])[-(self.context_length - count) :] for prompt in prompts]
        side = decoder if self._side and self._weight else None
        generated = greedy.generate(decoder, side, self._weight, ids, count, ending.is_reached, self.name)
        return [ending.text(new) for new in generated]


def _harness_model(answering: Answering):
    """Adapts `answering` to the harness; the class is defined here because its base class comes with the extra."""
    api = require("lm_eval.api.model", extra="harness")
    utils = require("lm_eval.utils", extra="harness")

    class Model(api.TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return answering.end

        @property
        def prefix_token_id(self) -> int:
            return answering.prefix

        @property
        def tokenizer_name(self) -> str:
            return "mlpmem"

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options) -> list[int]:
            return answering.encode(string, begins=add_special_tokens is not False)

        def _loglikelihood_tokens(self, requests, **options) -> list[tuple[float, bool]]:
            return answering.score([(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            sums = []
            for request in requests:
                windows = utils.get_rolling_token_windows(
                    token_list=answering.encode(request.args[0]),
                    prefix_token=answering.prefix,
                    max_seq_len=answering.context_length,
                    context_len=1,
                )
                pairs = [utils.make_disjoint_window(window) for window in windows]
                sums.append(sum(value for value, _ in answering.score(pairs)))
            return sums

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            texts, numbers_with = [""] * len(requests), {}  # those with equal options are written together
            for number, request in enumerate(requests):
                _, options = request.args
                if options.get("do_sample"):
                    raise UserError(f"{answering.name}: the task wants sampled text; only greedy decoding is supported")
                stops = options.get("until") or []
                stops = (stops,) if isinstance(stops, str) else tuple(stops)
                count = options.get("max_gen_toks", _MOST_NEW_TOKENS)
                numbers_with.setdefault((stops, count), []).append(number)
            for (stops, count), numbers in numbers_with.items():
                written = answering.write([requests[number].args[0] for number in numbers], stops, count)
                for number, text in zip(numbers, written, strict=True):
                    texts[number] = text
            return texts

    return Model()


def weight_of(workdir: Workdir, name: str) -> float:
    """The lambda of a system, as tuned on the validation split of the corpus; 0 without a side.

    Raises:
      UserError: kNN-LM's lambda has not been tuned yet.
    """
    side = SYSTEMS[name].side
    if not side:
        return 0.0
    memory = workdir.artifact("memory", "memory")
    if side == "memory":
        return find_weight(workdir.path, memory).value
    report = read_report(workdir.path, memory)
    if report is None:
        raise UserError(f"{workdir.path}: the lambda of kNN-LM is tuned by `evaluate`; run it first")
    return report["interpolation_weight"]["knn_lm"]


def run(config: ml_collections.ConfigDict, names: str, wanted: str, limit: int | None) -> dict:
    """Scores systems on harness tasks and prints a table.

    Args:
      config: config of a finished working directory.
      names: systems, separated by commas; those with passages in their prompts are refused.
      wanted: tasks, separated by commas: `lm_eval:NAME`, or `lm_eval:PATH/task.yaml` for a task file with local data.
      limit: examples per task; None = all.

    Returns:
      {system: the harness's results}, as in WORKDIR/comparison/lm_eval.json.

    Raises:
      UserError: a system or a task cannot be run.
    """
    chosen, workdir = systems.parse(names), Workdir(config)
    tasks, folders = [], set()
    for task in wanted.split(","):
        if not task.startswith(PREFIX):
            raise ConfigError(f"task {task!r}: expected {PREFIX}NAME or {PREFIX}PATH.yaml; for others, use `compare`")
        place = pathlib.Path(task.removeprefix(PREFIX))
        if place.suffix in (".yaml", ".yml"):
            if not place.exists():
                raise ConfigError(f"task {task!r}: {place} does not exist")
            folders.add(str(place.parent))
        tasks.append(place.stem if place.suffix in (".yaml", ".yml") else str(place))
    for name in chosen:
        if SYSTEMS[name].retrieves:
            raise ConfigError(f"comparison system {name!r}: the harness passes no questions to search; use `compare`")
        if SYSTEMS[name].side and SYSTEMS[name].model != SIDE_MODEL:
            raise ConfigError(f"comparison system {name!r}: mixes two language models, which only `compare` can run")
    lm_eval = require("lm_eval", extra="harness")
    manager = require("lm_eval.tasks", extra="harness").TaskManager(include_path=sorted(folders) or None)
    results = {}
    for name in chosen:
        weight = weight_of(workdir, name)
        say(f"== {name}" + (f" (lambda {weight:.2f})" if SYSTEMS[name].side else ""))
        model = _harness_model(Answering(workdir, name, weight))
        done = lm_eval.simple_evaluate(model=model, tasks=tasks, limit=limit, task_manager=manager, bootstrap_iters=0)
        results[name] = {"weight": weight, "results": done["results"]}
    if jax.process_index() == 0:
        file = workdir.results / "lm_eval.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1, default=str) + "\n")
        _show(results)
    return results


def _show(results_by_system: dict) -> None:
    table = rich.table.Table("task", "measure", *results_by_system)
    first = next(iter(results_by_system.values()))["results"]
    for task, values in first.items():
        for measure, value in values.items():
            if isinstance(value, float) and "stderr" not in measure:
                row = [f"{of['results'][task][measure]:.4f}" for of in results_by_system.values()]
                table.add_row(task, measure.removesuffix(",none"), *row)
    rich.console.Console().print(table)
