"""Stage `evaluate`: perplexities, intervals, sharpness of distributions, and the report.

Scores of the base and of p_kNN are stored with the datastore and the targets; only memories and the language models of
controls run here.
"""

from __future__ import annotations

import math
import time

import ml_collections
import numpy as np
import scipy.special
from etils import epath

from mlpmem_jax.core import host, stage_costs
from mlpmem_jax.core.artifacts import Artifact
from mlpmem_jax.core.config import plain_dict
from mlpmem_jax.core.progress import progress, say
from mlpmem_jax.corpus.tokens import TokenStream
from mlpmem_jax.evaluation import breakdown, intervals, perplexities, provenance, report, wording
from mlpmem_jax.evaluation.inputs import HELD_OUT, Inputs, open_inputs
from mlpmem_jax.evaluation.sharpness import SharpnessMean, rows_of_ragged
from mlpmem_jax.models import saved, scoring
from mlpmem_jax.retrieval.targets_artifact import TargetsReader

_PROBABILITIES_AT_ONCE = 2**22  # per distribution and chunk: 16 MiB of float32
_READ_PER_POSITION = 8  # positions that the base reads per sampled position
_TOKENS_AT_ONCE = 2**22  # chunk size for counting in the training text: 32 MiB of int64
_COUNTED_TOKENS = 2**28  # maximum training tokens to count in; takes a second per few million


def run(config: ml_collections.ConfigDict) -> dict:
    """Evaluates the memory of `config.workdir` and writes report/metrics.json, index.html and plots there.

    Returns:
      The contents of metrics.json.

    Raises:
      ArtifactError: an earlier stage is missing, or was built from other artifacts than the ones present.
      ConfigError: the test split is too short for intervals.
    """
    start = time.perf_counter()
    opened = open_inputs(config)
    for reason in opened.controls_left_out.values():
        say(f"left out of the report: {reason}")
    parameters, model, _ = saved.load_memory(opened.artifacts["memory"].path, opened.sharding)
    scores = {split: _scores(opened, split, parameters, model) for split in HELD_OUT}
    confidence = config.evaluation.confidence
    metrics = perplexities.compare(scores["validation"], scores["test"], confidence=confidence)
    metrics["confidence"] = confidence
    weights = metrics["interpolation_weight"]
    metrics["sharpness"], sample = _distributions(opened, parameters, model, weights["memory"])
    metrics["breakdown"] = _breakdown(opened, scores["test"], weights, sample)
    metrics |= _facts(opened)
    metrics["seconds"]["evaluate"] = time.perf_counter() - start
    metrics["peak_rss_bytes"]["evaluate"] = host.peak_rss_bytes()
    folder = epath.Path(config.workdir) / "report"
    try:
        report.write(folder, metrics)
    except OSError as error:
        if not report.is_there(folder, metrics):
            raise
        say(f"report: cannot be written again ({error.strerror or error}); the one there is of the same artifacts")
    say(" ".join(wording.verdict(metrics)))
    say(f"report: {folder / 'index.html'}")
    return metrics


def _computed_by(opened: Inputs) -> dict:
    """Arguments of `scoring` that all compared systems share."""
    return {"sharding": opened.sharding, "compute_dtype": opened.compute_dtype}


def _scores(opened: Inputs, split: str, parameters: dict, model) -> perplexities.Scores:
    datastore, count = opened.artifacts[f"datastore/{split}"], opened.sequences(split)[0]
    labels_SxT = opened.targets(split).label_probabilities(0, count)
    with np.errstate(divide="ignore"):
        knn_SxT = np.log(labels_SxT.astype(np.float64))
    other_memories, other_models = {}, {}
    for name, artifact in opened.controls.items():
        if artifact.kind == "memory":
            loaded = saved.load_memory(artifact.path, opened.sharding)[:2]
            other_memories[name] = _memory_scores(opened, split, *loaded, name)
        else:
            loaded = saved.load_language_model(artifact.path, opened.sharding)[:2]
            other_models[name] = _language_model_scores(opened, split, *loaded, name)
    return perplexities.Scores(
        base=datastore.read("base_log_probabilities", 0, count),
        memory=_memory_scores(opened, split, parameters, model, "memory"),
        knn=knn_SxT,
        documents=datastore.read("documents", 0, count),
        other_memories=other_memories,
        other_models=other_models,
    )


def _memory_scores(opened: Inputs, split: str, parameters: dict, model, name: str) -> np.ndarray:
    """log p_MLP of the next tokens, float32 [S, T], computed shard by shard."""
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
    """log p_LM of the next tokens, float32 [S, T], computed shard by shard."""
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


def _distributions(
    opened: Inputs, parameters: dict, model, weight: float
) -> tuple[dict[str, dict], tuple[np.ndarray, np.ndarray]]:
    """Sharpness of the four distributions at the same random test positions, and the base's entropy there.

    Returns:
      The sharpness summary of each distribution; and (positions [N] within the split, entropies [N] in nats).
    """
    length = opened.sequences("test")[1]
    positions_N = _sample(opened)
    base, base_model, _ = saved.load_language_model(opened.artifacts["base"].path, opened.sharding)
    vocabulary = max(base_model.vocab_size, model.vocab_size)  # models may pad the tokenizer's vocabulary
    on_mesh = _computed_by(opened)
    hidden_NxD = _hidden(opened, base, base_model, positions_N)
    means = {name: SharpnessMean() for name in ("base", "knn", "memory", "augmented")}
    entropies = []
    with progress(len(positions_N), "evaluate: whole distributions", "positions") as bar:
        for first, count in opened.shards("test"):
            begin, end = np.searchsorted(positions_N, [first * length, (first + count) * length])
            if begin == end:
                continue
            rows_C = positions_N[begin:end] - first * length
            inputs_CxD = opened.memory_inputs("test", first, count).reshape(count * length, -1)[rows_C]
            chunk = max(1, _PROBABILITIES_AT_ONCE // vocabulary)
            for at in range(0, len(rows_C), chunk):
                part = slice(at, at + chunk)
                hidden_BxD = hidden_NxD[begin:end][part]
                base_BxV = scoring.language_model_distributions(base, hidden_BxD, **on_mesh)
                memory_BxV = scoring.memory_distributions(parameters, model, inputs_CxD[part], **on_mesh)
                base_BxV, memory_BxV = (_widened(rows_BxV, vocabulary) for rows_BxV in (base_BxV, memory_BxV))
                entropies.append(scipy.special.entr(base_BxV).sum(axis=1))
                means["base"].add(base_BxV)
                means["memory"].add(memory_BxV)
                means["augmented"].add(weight * memory_BxV + (1 - weight) * base_BxV)
                means["knn"].add(_knn_rows(opened.targets("test"), first, count, rows_C[part]))
                bar.advance(len(base_BxV))
    return {name: mean.summary() for name, mean in means.items()}, (positions_N, np.concatenate(entropies))


def _sample(opened: Inputs) -> np.ndarray:
    """Random test positions within the split, ascending.

    They come from few sequences, so that the base reads only `_READ_PER_POSITION` positions per sampled one.
    """
    sequences, length = opened.sequences("test")
    settings = opened.config.evaluation
    generator = np.random.default_rng(settings.seed)
    positions = min(settings.sharpness_positions, sequences * length)
    few = min(sequences, -(-_READ_PER_POSITION * positions // length))
    chosen_S = generator.choice(sequences, few, replace=False)
    drawn_N = generator.choice(few * length, positions, replace=False)
    return np.sort(chosen_S[drawn_N // length] * length + drawn_N % length)


def _widened(distributions_NxV: np.ndarray, vocabulary: int) -> np.ndarray:
    """Pads distributions to a larger vocabulary with tokens of probability 0."""
    return np.pad(distributions_NxV, ((0, 0), (0, vocabulary - distributions_NxV.shape[1])))


def _hidden(opened: Inputs, base: dict, base_model, positions_N: np.ndarray) -> np.ndarray:
    """The base's final hidden states [N, D] at ascending positions within the test split."""
    length = opened.sequences("test")[1]
    chosen_S, places_N = np.unique(positions_N // length, return_inverse=True)
    rows_N = places_N * length + positions_N % length
    tokens_SxT = np.concatenate([opened.tokens("test", sequence, 1)[0] for sequence in chosen_S.tolist()])
    batch = max(1, scoring.chunk_positions(base_model.vocab_size, opened.sharding) // length)
    parts = []
    for at in range(0, len(chosen_S), batch):
        tokens_BxT = tokens_SxT[np.minimum(np.arange(at, at + batch), len(chosen_S) - 1)]  # a fixed shape compiles once
        hidden_BxTxD = scoring.language_model_hidden(base, base_model, tokens_BxT, **_computed_by(opened))
        begin, end = np.searchsorted(rows_N, [at * length, (at + batch) * length])
        parts.append(hidden_BxTxD.reshape(-1, base_model.width)[rows_N[begin:end] - at * length])
    return np.concatenate(parts)


def _knn_rows(targets: TargetsReader, first: int, count: int, rows_N: np.ndarray) -> np.ndarray:
    """p_kNN at positions rows_N of a shard, as zero-padded rows; sharpness does not depend on which token is which."""
    offsets_C1, _, entries_M = targets.read(first, first + count)
    starts_N, stops_N = offsets_C1[rows_N], offsets_C1[rows_N + 1]
    offsets_N1 = np.concatenate([[0], np.cumsum(stops_N - starts_N)])
    picked_M = np.concatenate(
        [entries_M[start:stop] for start, stop in zip(starts_N.tolist(), stops_N.tolist(), strict=True)]
    )
    return rows_of_ragged(picked_M, offsets_N1)


def _breakdown(
    opened: Inputs, test: perplexities.Scores, weights: dict[str, float], sample: tuple[np.ndarray, np.ndarray]
) -> dict:
    """Gains over the base by token frequency, by context frequency, and at the sample's positions by entropy.

    Args:
      test: scores of the test split.
      weights: lambda of every mixture.
      sample: sampled positions [N] of the split, and the base's entropies there.
    """
    sequences = opened.sequences("test")[0]
    systems = {name: scores.ravel() for name, scores in perplexities.mixtures(test, weights).items()}
    base_N = systems.pop("base")
    clusters_N = intervals.clusters_of(test.documents)[1].ravel()
    context_N, next_N = (part.ravel() for part in opened.tokens("test", 0, sequences))
    contexts = np.lib.stride_tricks.sliding_window_view(context_N, breakdown.CONTEXT)
    vocabulary = opened.artifacts["tokens"].summary["vocab_size"]
    counter, token_counts_V = breakdown.ContextCounter(contexts, vocabulary), np.zeros(vocabulary, np.int64)
    training = TokenStream(opened.artifacts["tokens"], "train")
    counted = min(training.length, _COUNTED_TOKENS)
    with progress(counted, "evaluate: counts in the training text", "tokens") as bar:
        for start in range(0, counted, _TOKENS_AT_ONCE):
            tokens_C = training.read(start, min(start + _TOKENS_AT_ONCE, counted))
            token_counts_V += np.bincount(tokens_C, minlength=vocabulary)
            counter.add(tokens_C)
            bar.advance(len(tokens_C))
    skipped = breakdown.CONTEXT - 1  # the split's first positions have too few tokens before them

    def gains(values_N: np.ndarray, edges, at) -> list[dict]:
        scores = {name: scores_N[at] for name, scores_N in systems.items()}
        confidence = opened.config.evaluation.confidence
        return breakdown.gains_by(values_N, edges, base_N[at], scores, clusters_N[at], confidence=confidence)

    return {
        "counted_tokens": counted,
        "token_count": gains(token_counts_V[next_N], breakdown.TOKEN_COUNTS, slice(None)),
        "context_count": gains(counter.counts(), breakdown.CONTEXT_COUNTS, slice(skipped, None)),
        "base_entropy": gains(sample[1], breakdown.ENTROPIES, sample[0]),
    }


def _figures(trained: Artifact) -> dict:
    """The numbers that training recorded in a model's manifest."""
    return {name: value for name, value in trained.summary.items() if isinstance(value, int | float)}


def _facts(opened: Inputs) -> dict:
    """The entries of metrics.json that are read rather than computed."""
    artifacts, workdir = opened.artifacts, opened.config.workdir
    targets_summary = artifacts["targets/train"].summary
    every = {**artifacts, **{f"controls/{name}": artifact for name, artifact in opened.controls.items()}}
    lengths = {split: opened.sequences(split) for split in ("train", *HELD_OUT)}
    return {
        "compute_dtype": opened.compute_dtype,
        "controls_left_out": opened.controls_left_out,
        "overlap": artifacts["tokens"].summary.get("overlap", {}),
        "targets": {name: value for name, value in targets_summary.items() if name != "search_curve"},
        "search_curve": targets_summary.get("search_curve", []),
        "counts": {
            "sequence_length": lengths["test"][1],
            "vocabulary": artifacts["tokens"].summary["vocab_size"],
            "tokens": {split: math.prod(shape) for split, shape in lengths.items()},
            "parameters": {name: artifacts[name].summary["parameter_count"] for name in ("base", "memory")},
        },
        **stage_costs.totals(workdir),
        "bytes": {name: provenance.artifact_bytes(artifact) for name, artifact in every.items()},
        "training": provenance.training_curves(workdir),
        "training_runs": {name: _figures(artifacts[name]) for name in ("base", "memory")},
        "control_runs": {name: _figures(control) for name, control in opened.controls.items()},
        "config": plain_dict(opened.config),
        "provenance": provenance.environment(every),
    }
