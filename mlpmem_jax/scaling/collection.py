"""Collects points.csv: one row per finished point, read from the artifacts of its tasks."""

from __future__ import annotations

import csv
import io
import json

import ml_collections
from etils import epath

from mlpmem_jax.core import stage_costs
from mlpmem_jax.core.artifacts import Artifact, open_artifact
from mlpmem_jax.core.errors import ArtifactError
from mlpmem_jax.models import flops, language_model, saved
from mlpmem_jax.models.memory import MemoryConfig
from mlpmem_jax.scaling import budgets
from mlpmem_jax.scaling.points import COLUMNS, FILE
from mlpmem_jax.scaling.sweep import Point, Sweep
from mlpmem_jax.training import continued

_MORE = (
    "corpus",
    "name",
    "training_flops",
    "construction_flops",
    "base_flops",
    "steps",
    "learning_rate",
    "base_perplexity",
    "validation_perplexity",
    "interpolation_weight",
    "seconds",
)


def write(sweep: Sweep, names: set[str]) -> epath.Path:
    """Writes points.csv, with the named points, into the sweep's workdir and returns its path.

    Raises:
      ArtifactError: points were trained on different tokens.
    """
    tokens = {}
    for point in sweep.points:
        if point.name in names:
            tokens.setdefault(_opened(point, "tokens", "tokens").fingerprint, point.name)
    if len(tokens) > 1:
        raise ArtifactError(
            f"{sweep.workdir}: points {' and '.join(list(tokens.values())[:2])} were trained on different tokens, "
            "so no single law fits their perplexities; run the sweep in another config.workdir"
        )
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, *_MORE], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row(sweep, point) for point in sweep.points if point.name in names)
    file = epath.Path(sweep.workdir) / FILE
    file.write_text(text.getvalue())
    return file


def row(sweep: Sweep, point: Point) -> dict[str, str | float]:
    """The row of points.csv for a finished point.

    parameters: those of every model used for prediction. tokens: positions trained on, counting repetitions.
    flops: training_flops, plus construction_flops if the sweep counts them. base_flops: earlier training of the base,
    empty if it was imported. Perplexities are on the test split, except for validation_perplexity.
    """
    base = _opened(point, "base", "base")
    model, length = saved.language_model_config(base), point.config.base.context_length
    values = _augmented(point, base) if point.arm == "augmented" else _continued(point, base)
    base_steps = base.summary.get("steps")
    per_step = continued.flops_per_step(model, length, point.config.base.training)
    counted = values["training_flops"]
    if sweep.counted == budgets.COUNTED[1]:
        counted += values["construction_flops"]
    return {
        "arm": point.label,
        "seed": point.seed,
        "name": point.name,
        "corpus": _corpus(point.config),
        "flops": counted,
        "base_flops": "" if base_steps is None else float(base_steps * per_step),
        "learning_rate": point.config.training.learning_rate,
        "seconds": round(sum(stage_costs.totals(point.config.workdir)["seconds"].values()), 1),
        **values,
    }


def _augmented(point: Point, base: Artifact) -> dict[str, float]:
    trained = _opened(point, "memory", "memory")
    metrics = json.loads((epath.Path(point.config.workdir) / "report" / "metrics.json").read_text())
    perplexity = metrics["perplexity"]
    return {
        "parameters": base.summary["parameter_count"] + trained.summary["parameter_count"],
        "tokens": trained.summary["positions"],
        "perplexity": perplexity["test"]["augmented"],
        "training_flops": 3.0
        * flops.memory_forward(MemoryConfig(**trained.summary["model"]))
        * trained.summary["positions"],
        "construction_flops": _construction(point, base, trained.summary["positions"]),
        "steps": trained.summary["steps"],
        "base_perplexity": perplexity["test"]["base"],
        "validation_perplexity": perplexity["validation"]["augmented"],
        "interpolation_weight": metrics["interpolation_weight"]["memory"],
    }


def _continued(point: Point, base: Artifact) -> dict[str, float | str]:
    trained = _opened(point, continued.FOLDER, "base")
    steps = trained.summary["steps"]
    return {
        "parameters": base.summary["parameter_count"],
        "tokens": steps * point.config.training.batch_sequences * point.config.base.context_length,
        "perplexity": trained.summary["perplexity"]["test"],
        "training_flops": trained.summary["training_flops"],
        "construction_flops": 0.0,
        "steps": steps,
        "learning_rate": trained.summary.get("learning_rate", point.config.training.learning_rate),
        "base_perplexity": "",
        "validation_perplexity": trained.summary["perplexity"]["validation"],
        "interpolation_weight": "",
    }


def _construction(point: Point, base: Artifact, trained_positions: int) -> float:
    """FLOPs of the point's datastore and targets, in full even if other points share them."""
    datastore, targets = (_opened(point, f"{kind}/train", kind) for kind in ("datastore", "targets"))
    key_model = None
    if point.config.datastore.key_model:
        key_model = saved.language_model_config(_opened(point, "key_model", "base"))
    model, length = saved.language_model_config(base), point.config.base.context_length
    positions, backend = datastore.summary["positions"], targets.config["backend"]
    total = budgets.construction(model, key_model, length, positions, backend, targets.config)
    if point.config.training.mode == "online":  # the base runs again in every step
        total += float(trained_positions) * language_model.forward_flops(model, length, output_projection=False)
    return total


def _opened(point: Point, folder: str, kind: str) -> Artifact:
    return open_artifact(epath.Path(point.config.workdir) / folder, kind)


def _corpus(config: ml_collections.ConfigDict) -> str:
    """A short name of the corpus, for an axis label."""
    corpus = config.corpus
    if corpus.source == "hub":
        return ", ".join(name.split("/")[-1] for name in corpus.name.split(","))
    return "installed documentation" if corpus.source == "installed_docs" else corpus.path.rstrip("/").split("/")[-1]
