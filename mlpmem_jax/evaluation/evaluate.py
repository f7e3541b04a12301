"""Stage `evaluate`: perplexities, intervals, shapes of distributions, and the report made of them.

The base's scores and those of p_kNN were stored with the datastore and the targets; only the memories, and language
models to compare with, run here.
"""

from __future__ import annotations

import dataclasses
import math
import time

import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mlpmem_jax.core import config as configs
from mlpmem_jax.core import mesh as meshes
from mlpmem_jax.core import runtime
from mlpmem_jax.core.artifacts import Artifact, open_artifact
from mlpmem_jax.core.errors import ArtifactError, ConfigError
from mlpmem_jax.core.manifests import read_manifest
from mlpmem_jax.core.progress import progress, say
from mlpmem_jax.corpus.tokens import TokenStream, read_sequences
from mlpmem_jax.evaluation import comparison, provenance, report, wording
from mlpmem_jax.evaluation.sharpness import SharpnessMean, rows_of_ragged
from mlpmem_jax.models import saved, scoring

HELD_OUT = ("validation", "test")
CONTROLS = {"continued": "base", "ce_only": "memory"}
"""Controls by folder name, and what each is: a language model by itself, or a memory to be mixed with the base."""

_PROBABILITIES_AT_ONCE = 2**22  # of one distribution in a chunk: 16 MiB of float32


@dataclasses.dataclass(frozen=True)
class _Run:
    """What evaluation reads: a working directory of finished stages, and the mesh to compute on."""

    config: ml_collections.ConfigDict
    artifacts: dict[str, Artifact]
    controls: dict[str, Artifact]
    mesh: Mesh
    rules: meshes.Rules

    def sequences(self, split: str) -> tuple[int, int]:
        """(number of sequences, positions in each)."""
        return self.artifacts[f"datastore/{split}"].arrays["next_tokens"].shape

    def shards(self, split: str) -> list[tuple[int, int]]:
        """(first sequence, number of sequences) of every shard."""
        count, per_shard = self.sequences(split)[0], self.artifacts[f"targets/{split}"].arrays["offsets"].rows_per_shard
        return [(first, min(per_shard, count - first)) for first in range(0, count, per_shard)]

    def inputs(self, split: str, first: int, count: int) -> np.ndarray:
        """Memory inputs [count, T, D]."""
        datastore = self.artifacts[f"datastore/{split}"]
        name = "memory_inputs" if "memory_inputs" in datastore.arrays else "keys"
        return datastore.read(name, first, first + count)

    def tokens(self, split: str, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and next tokens, int32 [count, T]."""
        stream = TokenStream(self.artifacts["tokens"], split)
        return read_sequences(stream, first, count, self.sequences(split)[1])[:2]


def run(config: ml_collections.ConfigDict) -> dict:
    """Evaluates the memory of `config.workdir` and writes report/metrics.json, index.html and overview.png there.

    Returns:
      What metrics.json holds.

    Raises:
      ArtifactError: a stage before this one is missing, or was made from another base.
      ConfigError: the test split is too short for a bootstrap.
    """
    start = time.perf_counter()
    opened = _open(config)
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


def _open(config: ml_collections.ConfigDict) -> _Run:
    workdir = epath.Path(config.workdir)
    artifacts = {"tokens": open_artifact(workdir / "tokens", "tokens"), "base": open_artifact(workdir / "base", "base")}
    for kind in ("datastore", "targets"):
        for split in ("train", *HELD_OUT):
            artifacts[f"{kind}/{split}"] = open_artifact(workdir / kind / split, kind)
    artifacts["memory"] = open_artifact(workdir / "memory", "memory")
    base = artifacts["base"].fingerprint
    for name in ("memory", *(f"datastore/{split}" for split in HELD_OUT)):
        if artifacts[name].inputs.get("base") != base:
            raise ArtifactError(
                f"{artifacts[name].path}: was made from another base than {artifacts['base'].path}; delete it and run "
                "its stage again"
            )
    sequences = artifacts["datastore/test"].arrays["next_tokens"].shape[0]
    if sequences < 2:
        raise ConfigError(
            f"config.corpus.test_fraction: the test split holds {sequences} sequence of "
            f"{config.base.context_length} tokens, intervals need 2 or more; raise it, or lower "
            "config.base.context_length"
        )
    mesh, rules = meshes.mesh_of(config)
    return _Run(config, artifacts, _controls(workdir / "controls", base), mesh, rules)


def _controls(folder: epath.Path, base: str) -> dict[str, Artifact]:
    """The finished controls of this very base."""
    found = {}
    for name, kind in CONTROLS.items():
        manifest = read_manifest(str(folder / name))
        if manifest is None or not manifest["sealed"]:
            continue
        if manifest["inputs"].get("base") != base:
            say(f"{folder / name}: was made from another base, and is left out of the report")
            continue
        found[name] = open_artifact(folder / name, kind)
    return found


def _scores(opened: _Run, split: str, parameters: dict, model) -> comparison.Scores:
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


def _memory_scores(opened: _Run, split: str, parameters: dict, model, name: str) -> np.ndarray:
    """log p_MLP of the next tokens, float32 [S, T], shard by shard."""
    sequences, length = opened.sequences(split)
    rows = []
    with progress(sequences * length, f"evaluate: {name} on {split}", "positions") as bar:
        for first, count in opened.shards(split):
            inputs_NxD = opened.inputs(split, first, count).reshape(count * length, -1)
            next_N = opened.artifacts[f"datastore/{split}"].read("next_tokens", first, first + count).reshape(-1)
            scores_N = scoring.memory_log_probabilities(
                parameters, model, inputs_NxD, next_N, mesh=opened.mesh, rules=opened.rules
            )
            rows.append(scores_N.reshape(count, length))
            bar.advance(count * length)
    return np.concatenate(rows)


def _language_model_scores(opened: _Run, split: str, parameters: dict, model, name: str) -> np.ndarray:
    """log p_LM of the next tokens, float32 [S, T], shard by shard."""
    sequences, length = opened.sequences(split)
    rows = []
    with progress(sequences * length, f"evaluate: {name} on {split}", "positions") as bar:
        for first, count in opened.shards(split):
            tokens_SxT, next_SxT = opened.tokens(split, first, count)
            rows.append(
                scoring.language_model_log_probabilities(
                    parameters, model, tokens_SxT, next_SxT, mesh=opened.mesh, rules=opened.rules
                )
            )
            bar.advance(count * length)
    return np.concatenate(rows)


def _sharpness(opened: _Run, parameters: dict, model, weight: float) -> dict[str, dict]:
    """Shapes of the four distributions at random test positions, the same ones for all."""
    sequences, length = opened.sequences("test")
    settings = opened.config.evaluation
    positions = min(settings.sharpness_positions, sequences * length)
    chosen_N = np.sort(
        np.random.default_rng(settings.seed).choice(sequences * length, positions, replace=False, shuffle=False)
    )
    base, base_model, _ = saved.load_language_model(opened.artifacts["base"].path, opened.mesh, opened.rules)
    on_mesh = {"mesh": opened.mesh, "rules": opened.rules}
    means = {name: SharpnessMean() for name in ("base", "knn", "memory", "augmented")}
    shards = opened.shards("test")
    with progress(positions, "evaluate: shapes of distributions", "positions") as bar:
        for shard, (first, count) in enumerate(shards):
            rows_N = chosen_N[(chosen_N >= first * length) & (chosen_N < (first + count) * length)] - first * length
            if not len(rows_N):
                continue
            tokens_SxT, _ = opened.tokens("test", first, count)
            hidden_NxD = _hidden(base, base_model, tokens_SxT, rows_N, on_mesh)
            inputs_NxD = opened.inputs("test", first, count).reshape(count * length, -1)[rows_N]
            chunk = max(1, _PROBABILITIES_AT_ONCE // model.vocab_size)
            for at in range(0, len(rows_N), chunk):
                part = slice(at, at + chunk)
                base_NxV = scoring.language_model_distributions(base, hidden_NxD[part], **on_mesh)
                memory_NxV = scoring.memory_distributions(parameters, model, inputs_NxD[part], **on_mesh)
                means["base"].add(base_NxV)
                means["memory"].add(memory_NxV)
                means["augmented"].add(weight * memory_NxV + (1 - weight) * base_NxV)
                means["knn"].add(_knn_rows(opened.artifacts["targets/test"], shard, first, count, rows_N[part]))
                bar.advance(len(base_NxV))
    return {name: mean.summary() for name, mean in means.items()}


def _hidden(base: dict, base_model, tokens_SxT: np.ndarray, rows_N: np.ndarray, on_mesh: dict) -> np.ndarray:
    """Final hidden states [N, D] at positions rows_N of the sequences, counted through all of them."""
    length = tokens_SxT.shape[1]
    batch = max(1, scoring.chunk_positions(base_model.vocab_size, on_mesh["mesh"]) // length)
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


def _facts(opened: _Run) -> dict:
    """Everything of metrics.json that is read rather than computed."""
    artifacts, workdir = opened.artifacts, opened.config.workdir
    every = {**artifacts, **{f"controls/{name}": artifact for name, artifact in opened.controls.items()}}
    lengths = {split: opened.sequences(split) for split in ("train", *HELD_OUT)}
    return {
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
