"""Stage `targets`: the next-token distribution p_kNN of every position of every split.

The keys of the training split are divided into shards, each with an index; queries use the shards of their datastore;
`tiles` processes all pairs. Indices, measurements on each shard and partial neighbors are stored in a scratch folder
until the stage is finished: a killed stage resumes where it stopped and produces the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable

import jax
import ml_collections
import numpy as np
from etils import epath

from mlpmem_jax.core.artifacts import Artifact, find_finished, open_artifact
from mlpmem_jax.core.config import plain_dict
from mlpmem_jax.core.errors import ConfigError
from mlpmem_jax.core.mesh import barrier
from mlpmem_jax.core.progress import say
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.corpus.documents import SPLITS
from mlpmem_jax.retrieval import backends, needs, neighbors, temperature, tuning
from mlpmem_jax.retrieval.key_shards import KeyShards, Search
from mlpmem_jax.retrieval.quality import Sample, named
from mlpmem_jax.retrieval.queries import sample_queries
from mlpmem_jax.retrieval.scratch import Measurements, write_whole
from mlpmem_jax.retrieval.targets_artifact import KIND, TargetsWriter, array_specs, folder_of
from mlpmem_jax.retrieval.tiles import Split, TargetSettings, make_tiles


def run(config: ml_collections.ConfigDict) -> dict[str, Artifact]:
    """Builds the target distributions of every split, from neighbors among the keys of the training split.

    Raises:
      UserError: an input is missing or contradicts the config.
    """
    workdir = epath.Path(config.workdir)
    datastores = {split: open_artifact(workdir / "datastore" / split, "datastore") for split in SPLITS}
    inputs = {f"datastore/{split}": datastores[split].fingerprint for split in SPLITS}
    name, backend = backends.chosen(config.targets.backend)
    settings = _settings(config, name)
    unfinished = [split for split in SPLITS if not find_finished(folder_of(workdir, split), KIND, settings, inputs)]
    if unfinished:
        search = Search.create(backend, settings, Sharding.of(config).mesh)
        _build(config, settings, inputs, datastores, search, unfinished)
    else:
        say("targets: already finished")
    scratch = _scratch_folder(workdir)
    if jax.process_index() == 0 and scratch.exists():
        scratch.rmtree()
    return {split: open_artifact(folder_of(workdir, split), KIND) for split in SPLITS}


def _settings(config: ml_collections.ConfigDict, backend: str) -> dict:
    """config.targets as stored in manifests, without keys whose values have no effect."""
    settings = {**plain_dict(config.targets), "backend": backend}
    if not settings["search_dimensions"]:
        del settings["search_dimensions"]
    if settings["recall_target"] == 1:
        del settings["recall_target"]
    return settings


def _scratch_folder(workdir: epath.Path) -> epath.Path:
    return workdir / KIND / "scratch"


def _build(
    config: ml_collections.ConfigDict,
    settings: dict,
    inputs: dict[str, str],
    datastores: dict[str, Artifact],
    search: Search,
    splits: list[str],
) -> None:
    """Builds the targets of `splits`; finished ones are left as they are."""
    workdir, k = epath.Path(config.workdir), settings["k"]
    entries = min(k, settings["keep"] or k)
    token_dtype = open_artifact(workdir / "tokens", "tokens").arrays["train"].dtype
    specs = {split: array_specs(datastores[split], token_dtype, entries) for split in splits}
    # Indices do not depend on the required recall.
    indexed = {key: value for key, value in settings.items() if key != "recall"}
    digest = hashlib.sha256(json.dumps([indexed, inputs], sort_keys=True).encode()).hexdigest()[:12]
    scratch = _scratch_folder(workdir) / digest  # so that files of another config are not used
    _check(settings, search, datastores["train"], entries, scratch)

    scratch.mkdir(parents=True, exist_ok=True)
    mesh = Sharding.of(config).mesh
    key_shards = KeyShards.prepare(datastores["train"], settings["key_shard_rows"], scratch, search, mesh)
    if not search.backend.is_collective:  # each process builds a share of the indices
        for number in range(jax.process_index(), len(key_shards), jax.process_count()):
            key_shards.open(number)
    measurements = Measurements(scratch / "measured", search.backend.is_collective)
    barrier("targets indices built")
    measured = _measured_once(
        scratch / f"measured_{settings['recall']:g}.json",
        lambda: _measure(settings, datastores, key_shards, measurements),
    )
    target_settings = TargetSettings(
        k=k,
        exclude=settings["exclude"],
        keep=settings["keep"],
        minimum_probability=settings["minimum_probability"],
        temperature=measured["temperature"],
        effort=_effort(key_shards, measured.get("search_options")),
    )
    # Only now: a build that misses its recall must leave no artifact that another build could conflict with.
    writers = {split: TargetsWriter(folder_of(workdir, split), settings, inputs, specs[split]) for split in splits}
    make_tiles(
        [Split(split, datastores[split], writers[split], scratch) for split in splits], key_shards, target_settings
    )
    barrier("targets written")
    if jax.process_index() == 0:
        for writer in writers.values():
            writer.seal({**measured, "key_shards": len(key_shards)})
    barrier("targets sealed")


def _measured_once(file: epath.Path, measure: Callable[[], dict]) -> dict:
    """The result of `measure()`, run by all processes together, cached in a file."""
    if not file.exists():
        measured = measure()
        if jax.process_index() == 0:
            write_whole(file, json.dumps(measured).encode())
    barrier("targets measured")
    return json.loads(file.read_text())


def _measure(
    settings: dict, datastores: dict[str, Artifact], key_shards: KeyShards, measurements: Measurements
) -> dict:
    """The search effort, the temperature, and the quality of the search; for the manifest."""
    k, measured = settings["k"], {"backend": settings["backend"], "k": settings["k"]}
    if key_shards.search.dimensions:
        measured["search_variance_kept"] = key_shards.variance_kept
    trials, place = [], 0
    if not key_shards.search.is_exact:
        queries = sample_queries(datastores["train"], settings["quality_positions"])
        sample = Sample.draw(key_shards, queries, settings["exclude"], k, measurements)
        trials, place = tuning.reach(key_shards, sample, settings["recall"])
    effort = trials[place].effort if trials else None
    measured |= _temperature(settings, datastores["validation"], key_shards, effort, measurements)
    curve = [trial.summary(measured["temperature"], sample) for trial in trials]
    reached = curve[place] if trials else {"recall": 1.0, "total_variation": 0.0}
    measured |= {"recall_at_k": reached["recall"], "total_variation": reached["total_variation"]}
    measured["search_curve"] = curve
    if effort is not None:
        measured["search_options"] = dataclasses.asdict(effort)
    say(
        f"targets: temperature {measured['temperature']:.4g}, recall@{k} {measured['recall_at_k']:.3f}, "
        f"total variation {measured['total_variation']:.4f}"
    )
    return measured


def _effort(key_shards: KeyShards, fields: dict | None) -> backends.Effort | None:
    """The effort with the given fields."""
    efforts, _ = key_shards.efforts()
    return next((effort for effort in efforts if dataclasses.asdict(effort) == fields), None)


def _temperature(
    settings: dict,
    datastore: Artifact,
    key_shards: KeyShards,
    effort: backends.Effort | None,
    measurements: Measurements,
) -> dict[str, float]:
    """The temperature from the config, or else the best one on a sample of the validation split."""
    queries, packed_QxK = sample_queries(datastore, settings["quality_positions"]), None

    def search(number: int) -> np.ndarray:
        found = key_shards.search_shard(number, queries, settings["k"], None, effort)
        return key_shards.open(number).packed(*found)

    for nearest_QxK in measurements.of_shards(f"validation,{named(effort)}", range(len(key_shards)), search):
        packed_QxK = neighbors.merge(packed_QxK, nearest_QxK)
    distances_QxK, tokens_QxK = neighbors.unpack(packed_QxK)
    is_label_QxK = tokens_QxK == queries.next_tokens_Q[:, None]
    held_out = temperature.HeldOut(distances_QxK, is_label_QxK, queries.base_log_probabilities_Q)
    choice = best = held_out.best()
    if settings["temperature"]:
        choice = held_out.mixture(settings["temperature"])
        say(f"targets: {temperature.compared(choice, best, held_out.base_perplexity)}")
    return {
        "temperature": choice.temperature,
        "best_temperature": best.temperature,
        "sample_interpolation_weight": choice.interpolation_weight,
    }


def _check(settings: dict, search: Search, datastore: Artifact, entries: int, scratch: epath.Path) -> None:
    """Raises ConfigError if the settings do not suit the keys, or a shard of keys does not fit this host."""
    spec = datastore.arrays["keys"]
    sequences, length, width = spec.shape
    if settings["k"] >= sequences * length:
        raise ConfigError(
            f"config.targets.k: {settings['k']} neighbors of {sequences * length} training positions; lower it, or "
            "provide more text"
        )
    if search.dimensions >= width:
        raise ConfigError(
            f"config.targets.search_dimensions: expected fewer than the {width} dimensions of the keys, or 0 for all, "
            f"found {search.dimensions}"
        )
    sample = min(search.training_sample, sequences * length)
    if search.dimensions > sample:
        raise ConfigError(
            f"config.targets.search_dimensions: {search.dimensions} cannot be fitted on a sample of {sample} keys; "
            "lower it, or raise config.targets.training_sample"
        )
    rows = min(settings["key_shard_rows"], sequences * length)
    load = needs.Workload(spec.rows_per_shard * length, settings["k"], entries)
    of_process = needs.of_process(search, rows, width, np.dtype(spec.dtype).itemsize, load, jax.process_count())
    needs.check(of_process, rows, scratch)
    if settings["exclude"] == "document":
        first, last = (datastore.read("documents", row, row + 1)[0] for row in (0, sequences - 1))
        if first[0] == last[-1]:
            raise ConfigError(
                "config.targets.exclude: 'document' leaves no neighbors: the training split is a single document; "
                "use 'self', or lower config.corpus.document_bytes"
            )
