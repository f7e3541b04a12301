"""Stage `evaluate`: perplexities, intervals, shapes of distributions, and the report made of them.

The base's scores and those of p_kNN were stored with the datastore and the targets; only the memories, and language
models to compare with, run here.
"""

from __future__ import annotations

import math
import time

import ml_collections
import numpy as np
from etils import epath

from mlpmem_jax.core import config as configs
from mlpmem_jax.core import runtime
from mlpmem_jax.core.artifacts import Artifact
from mlpmem_jax.core.progress import progress, say
from mlpmem_jax.evaluation import comparison, provenance, report, wording
from mlpmem_jax.evaluation.inputs import HELD_OUT, Inputs, open_inputs
from mlpmem_jax.evaluation.sharpness import SharpnessMean, rows_of_ragged
from mlpmem_jax.models import saved, scoring

_PROBABILITIES_AT_ONCE = 2**22  # of one distribution in a chunk: 16 MiB of float32


def run(config: ml_collections.ConfigDict) -> dict:
    """Evaluates the memory of `config.workdir` and writes report/metrics.json, index.html and overview.png there.

    Returns:
      What metrics.json holds.

    Raises:
      ArtifactError: a stage before this one is missing, or was made from others than those that are there.
      ConfigError: the test split is too short for intervals.
    """
    start = time.perf_counter()
    opened = open_inputs(config)
    for reason in opened.controls_left_out.values():
        say(f"left out of the report: {reason}")
    parameters, model, _ = saved.load_memory(opened.artifacts["memory"].path, opened.mesh, opened.rules)
    scores = {split: _scores(opened, split, parameters, model) for split in HELD_OUT}
    settings = config.evaluation
    metrics = comparison.compare(
        scores["validation"],
        scores["test"],
        samples=settings.bootstrap_samples,
        confidence=settings.confidence,
        seed=settings.seed,
    )
    metrics["confidence"] = settings.confidence
    metrics["sharpness"] = _sharpness(opened, parameters, model, metrics["interpolation_weight"]["memory"])
    metrics |= _facts(opened)
    metrics["seconds"]["evaluate"] = time.perf_counter() - start
    metrics["peak_rss_bytes"]["evaluate"] = runtime.peak_rss_bytes()
    folder = report.write(epath.Path(config.workdir) / "report", metrics)
    say(" ".join(wording.verdict(metrics)))
    say(f"report: {folder / 'index.html'}")
    return metrics


def _computed_by(opened: Inputs) -> dict:
    """Arguments of `scoring` that are the same for all that is compared."""
    return {"mesh": opened.mesh, "rules": opened.rules, "compute_dtype": opened.compute_dtype}


def _scores(opened: Inputs, split: str, parameters: dict, model) -> comparison.Scores:
    datastore, targets = opened.artifacts[f"datastore/{split}"], opened.artifacts[f"targets/{split}"]
    count = opened.sequences(split)[0]
    labels_SxT = targets.read("label_probabilities", 0, count)
    with np.errstate(divide="ignore"):
        knn_SxT = np.log(labels_SxT.astype(np.float64))
    other_memories, other_models = {}, {}
    for name, artifact in opened.controls.items():
        if artifact.kind == "memory":
            loaded = saved.load_memory(artifact.path, opened.mesh, opened.rules)[:2]
            other_memories[name] = _memory_scores(opened, split, *loaded, name)
        else:
            loaded = saved.load_language_model(artifact.path, opened.mesh, opened.rules)[:2]
            other_models[name] = _language_model_scores(opened, split, *loaded, name)
    return comparison.Scores(
        base=datastore.read("base_log_probabilities", 0, count),
        memory=_memory_scores(opened, split, parameters, model, "memory"),
        knn=knn_SxT,
        documents=datastore.read("documents", 0, count),
        other_memories=other_memories,
        other_models=other_models,
    )


def _memory_scores(opened: Inputs, split: str, parameters: dict, model, name: str) -> np.ndarray:
    """log p_MLP of the next tokens, float32 [S, T], shard by shard."""
    sequences, length = opened.sequences(split)
    rows = []
    with progress(sequences * length, f"evaluate: {name} on {split}", "positions") as bar:
        for first, count in opened.shards(split):
            inputs_NxD = opened.memory_inputs(split, first, count).reshape(count * length, -1)
            next_N = opened.artifacts[f"datastore/{split}"].read("next_tokens", first, first + count).reshape(-1)
            scores_N = scoring.memory_log_probabilities(parameters, model, inputs_NxD, next_N, **_computed_by(opened))
            rows.append(scores_N.reshape(count, length))
            bar.advance(count * length)
    return np.concatenate(rows)


def _language_model_scores(opened: Inputs, split: str, parameters: dict, model, name: str) -> np.ndarray:
    """log p_LM of the next tokens, float32 [S, T], shard by shard."""
    sequences, length = opened.sequences(split)
    rows = []
    with progress(sequences * length, f"evaluate: {name} on {split}", "positions") as bar:
        for first, count in opened.shards(split):
            tokens_SxT, next_SxT = opened.tokens(split, first, count)
            rows.append(
                scoring.language_model_log_probabilities(
                    parameters, model, tokens_SxT, next_SxT, **_computed_by(opened)
                )
            )
            bar.advance(count * length)
    return np.concatenate(rows)


def _sharpness(opened: Inputs, parameters: dict, model, weight: float) -> dict[str, dict]:
    """Shapes of the four distributions at random test positions, the same ones for all."""
    sequences, length = opened.sequences("test")
    settings = opened.config.evaluation
    positions = min(settings.sharpness_positions, sequences * length)
    chosen_N = np.sort(
        np.random.default_rng(settings.seed).choice(sequences * length, positions, replace=False, shuffle=False)
    )
    base, base_model, _ = saved.load_language_model(opened.artifacts["base"].path, opened.mesh, opened.rules)
    vocabulary = max(base_model.vocab_size, model.vocab_size)  # models are padded beyond the tokenizer's
    on_mesh = _computed_by(opened)
    means = {name: SharpnessMean() for name in ("base", "knn", "memory", "augmented")}
    shards = opened.shards("test")
    with progress(positions, "evaluate: shapes of distributions", "positions") as bar:
        for shard, (first, count) in enumerate(shards):
            rows_N = chosen_N[(chosen_N >= first * length) & (chosen_N < (first + count) * length)] - first * length
            if not len(rows_N):
                continue
            tokens_SxT, _ = opened.tokens("test", first, count)
            hidden_NxD = _hidden(base, base_model, tokens_SxT, rows_N, on_mesh)
            inputs_NxD = opened.memory_inputs("test", first, count).reshape(count * length, -1)[rows_N]
            chunk = max(1, _PROBABILITIES_AT_ONCE // vocabulary)
            for at in range(0, len(rows_N), chunk):
                part = slice(at, at + chunk)
                base_NxV = _widened(scoring.language_model_distributions(base, hidden_NxD[part], **on_mesh), vocabulary)
                memory_NxV = _widened(
                    scoring.memory_distributions(parameters, model, inputs_NxD[part], **on_mesh), vocabulary
                )
                means["base"].add(base_NxV)
                means["memory"].add(memory_NxV)
                means["augmented"].add(weight * memory_NxV + (1 - weight) * base_NxV)
                means["knn"].add(_knn_rows(opened.artifacts["targets/test"], shard, first, count, rows_N[part]))
                bar.advance(len(base_NxV))
    return {name: mean.summary() for name, mean in means.items()}


def _widened(distributions_NxV: np.ndarray, vocabulary: int) -> np.ndarray:
    """Distributions over a larger vocabulary, whose further tokens have no probability."""
    return np.pad(distributions_NxV, ((0, 0), (0, vocabulary - distributions_NxV.shape[1])))


def _hidden(base: dict, base_model, tokens_SxT: np.ndarray, rows_N: np.ndarray, on_mesh: dict) -> np.ndarray:
    """Final hidden states [N, D] at positions rows_N of the sequences, counted through all of them."""
    length = tokens_SxT.shape[1]
    batch = max(1, scoring.chunk_positions(base_model.vocab_size, on_mesh["mesh"], on_mesh["rules"]) // length)
    parts = []
    for at in range(0, len(tokens_SxT), batch):
        hidden_BxTxD = scoring.language_model_hidden(base, base_model, tokens_SxT[at : at + batch], **on_mesh)
        wanted_N = rows_N[(rows_N >= at * length) & (rows_N < (at + batch) * length)] - at * length
        parts.append(hidden_BxTxD.reshape(-1, base_model.width)[wanted_N])
    return np.concatenate(parts)


def _knn_rows(targets: Artifact, shard: int, first: int, count: int, rows_N: np.ndarray) -> np.ndarray:
    """p_kNN at positions rows_N of a shard, one zero-padded row each; which token is which does not matter here."""
    offsets_SxT1 = targets.read("offsets", first, first + count)
    length = offsets_SxT1.shape[1] - 1
    entries_M = targets.read_ragged("probabilities", shard)
    starts_N, stops_N = (offsets_SxT1[rows_N // length, rows_N % length + end] for end in (0, 1))
    offsets_N1 = np.concatenate([[0], np.cumsum(stops_N - starts_N)])
    picked_M = np.concatenate(
        [entries_M[start:stop] for start, stop in zip(starts_N.tolist(), stops_N.tolist(), strict=True)]
    )
    return rows_of_ragged(picked_M, offsets_N1)


def _figures(trained: Artifact) -> dict:
    """The numbers that training left in a model's manifest."""
    return {name: value for name, value in trained.summary.items() if isinstance(value, int | float)}


def _facts(opened: Inputs) -> dict:
    """Everything of metrics.json that is read rather than computed."""
    artifacts, workdir = opened.artifacts, opened.config.workdir
    every = {**artifacts, **{f"controls/{name}": artifact for name, artifact in opened.controls.items()}}
    lengths = {split: opened.sequences(split) for split in ("train", *HELD_OUT)}
    return {
        "compute_dtype": opened.compute_dtype,
        "controls_left_out": opened.controls_left_out,
        "targets": artifacts["targets/train"].summary,
        "counts": {
            "sequence_length": lengths["test"][1],
            "vocabulary": artifacts["tokens"].summary["vocab_size"],
            "tokens": {split: math.prod(shape) for split, shape in lengths.items()},
            "parameters": {name: artifacts[name].summary["parameter_count"] for name in ("base", "memory")},
        },
        **provenance.stage_costs(workdir),
        "bytes": {name: provenance.artifact_bytes(artifact) for name, artifact in every.items()},
        "training": provenance.training_curves(workdir),
        "training_runs": {name: _figures(artifacts[name]) for name in ("base", "memory")},
        "config": configs.plain(opened.config),
        "provenance": provenance.environment(every),
    }
