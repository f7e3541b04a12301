"""The learning rate of a training that starts from finished parameters, found by trying several.

Short runs at all rates choose the two best, and these train in full, because short runs prefer rates that are too high
for long ones. The results of short runs, and whole runs, are kept in a subfolder until `remove_runs`, so that an
interrupted search resumes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
from etils import epath

from mlpmem_jax.core.mesh import barrier
from mlpmem_jax.core.progress import say
from mlpmem_jax.retrieval.scratch import write_whole
from mlpmem_jax.training import metrics

_SHORT_RUN = 1 / 8  # of the steps, per rate
_FINALISTS = 2
_FOLDER = "rates"  # within the artifact's folder


def total_steps(steps: int, rates: Sequence[float]) -> int:
    """The optimizer steps of all runs of a search for a training of `steps`."""
    return len(rates) * _short_steps(steps) + min(_FINALISTS, len(rates)) * steps if steps else 0


def _short_steps(steps: int) -> int:
    return max(1, round(_SHORT_RUN * steps))


def best_of(
    rates: Sequence[float],
    settings: ml_collections.ConfigDict,
    train: Callable[[ml_collections.ConfigDict, str, str], tuple[Any, dict]],
    *,
    name: str,
    folder: str,
    flops_per_step: int,
) -> tuple[Any, dict]:
    """Trains at the rate that reaches the lowest validation perplexity.

    Args:
      rates: peak learning rates.
      settings: settings of the whole training.
      train: (settings, name, folder) -> (parameters, summary); resumes what is in the folder.
      name: label for progress output.
      folder: the artifact's folder.
      flops_per_step: FLOPs of a step.

    Returns:
      Parameters and summary of the best whole run. The summary also has learning_rate; rate_search and rate_finals
      (rate -> validation perplexity of its short and its whole run); and rate_search_flops, those of all other runs.
    """
    short = ml_collections.ConfigDict(settings)
    short.steps = _short_steps(settings.steps)
    short.warmup_steps = min(settings.warmup_steps, short.steps // 10)
    short.profile_steps = ""
    tried = {}
    for rate in rates:
        short.learning_rate = rate
        tried[rate] = _perplexity_of_short_run(short, train, name, epath.Path(folder) / _FOLDER / f"{rate:g}")
    say(f"{name}: validation perplexity of short runs by rate: {_list(tried)}")

    def train_whole(rate: float) -> tuple[Any, dict]:
        whole = ml_collections.ConfigDict(settings)
        whole.learning_rate = rate
        return train(whole, f"{name} at rate {rate:g}, whole", _whole_folder(folder, rate))

    finals, trained = {}, None
    for rate in sorted(tried, key=tried.get)[:_FINALISTS][::-1]:  # the likelier winner last
        trained = None  # frees device memory
        trained = train_whole(rate)
        finals[rate] = trained[1]["validation"]["perplexity"]
    best = min(finals, key=finals.get)
    if best != rate:
        trained = None
        trained = train_whole(best)
    say(f"{name}: learning rate {best:g}; validation perplexity of whole runs by rate: {_list(finals)}")
    _copy_metrics(epath.Path(_whole_folder(folder, best)), epath.Path(folder))
    parameters, summary = trained
    searched = total_steps(settings.steps, rates) - settings.steps
    return parameters, summary | {
        "learning_rate": best,
        "rate_search": {f"{rate:g}": perplexity for rate, perplexity in tried.items()},
        "rate_finals": {f"{rate:g}": perplexity for rate, perplexity in finals.items()},
        "rate_search_flops": float(flops_per_step) * searched,
    }


def _perplexity_of_short_run(settings: ml_collections.ConfigDict, train, name: str, folder: epath.Path) -> float:
    """The validation perplexity of a run, whose checkpoints are not kept: those of a large model fill a disk."""
    result = folder.parent / f"{folder.name}.json"
    if result.exists():
        return json.loads(result.read_text())
    perplexity = train(settings, f"{name} at rate {settings.learning_rate:g}", str(folder))[1]["validation"][
        "perplexity"
    ]
    barrier("short run finished")
    if jax.process_index() == 0:
        write_whole(result, json.dumps(perplexity).encode())
        folder.rmtree()
    return perplexity


def _whole_folder(folder: str, rate: float) -> str:
    return f"{folder}/{_FOLDER}/{rate:g}-whole"


def _list(perplexities: dict[float, float]) -> str:
    return ", ".join(f"{rate:g}: {perplexity:.2f}" for rate, perplexity in perplexities.items())


def _copy_metrics(source: epath.Path, destination: epath.Path) -> None:
    if jax.process_index() != 0:
        return
    boards = source / metrics.BOARD
    for file in (source / metrics.FILE, *(boards.iterdir() if boards.exists() else ())):
        copy = destination / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        file.copy(copy, overwrite=True)


def remove_runs(path: str) -> None:
    """Deletes the runs; called when the artifact is sealed, after all processes have read what they need."""
    folder = epath.Path(path) / _FOLDER
    if jax.process_index() == 0 and folder.exists():
        folder.rmtree()
