"""Stage `targets`: the next-token distribution p_kNN of every position of every split.

The keys of the training split are divided in shards with an index each, the positions that look for neighbors in
those of their datastore; `tiles` works through all pairs. Indices, unfinished neighbors and measurements are kept in
a scratch folder until the stage is finished: a stage that was killed goes on where it stopped, and ends with the same
bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json

import jax
import ml_collections
import numpy as np
from etils import epath

from mlpmem_jax.core import config as configs
from mlpmem_jax.core import runtime
from mlpmem_jax.core.artifacts import Artifact, find_finished, open_artifact
from mlpmem_jax.core.errors import ConfigError
from mlpmem_jax.core.mesh import barrier
from mlpmem_jax.core.progress import say
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.retrieval import neighbors, quality, scann_index, temperature, tuning
from mlpmem_jax.retrieval.datastore import SPLITS
from mlpmem_jax.retrieval.key_shards import KeyShards, Search, host_bytes, sample_queries
from mlpmem_jax.retrieval.targets_artifact import KIND, TargetsWriter, array_specs, folder_of
from mlpmem_jax.retrieval.tiles import Plan, Split, find_neighbors, make_tiles


def resolve_backend(name: str) -> str:
    """The backend, "scann" or "exact", that the config's "auto", "scann" or "exact" stands for.

    Raises:
      ConfigError: ScaNN is asked for and cannot be used.
    """
    if name == "exact" or scann_index.is_available():
        return "exact" if name == "exact" else "scann"
    if name == "scann":
        raise ConfigError(
            f"config.targets.backend: 'scann' {scann_index.unavailable()}; set it to 'auto' or 'exact', or install it"
        )
    say(f"targets: ScaNN {scann_index.unavailable()}: taking the exact backend")
    return "exact"


def _measure(config, plan: Plan, datastores: dict[str, Artifact], key_shards: KeyShards) -> dict:
    """How hard to search, the temperature, and how good the search is; for the manifest."""
    settings = config.targets
    measured: dict = {"backend": plan.backend, "k": plan.k}
    if settings.search_dimensions:
        measured["search_variance_kept"] = key_shards.variance_kept
    sample, trials = None, []
    if not key_shards.are_exact:
        queries = sample_queries(datastores["train"], settings.quality_positions)
        sample = quality.Sample(key_shards, queries, plan.exclude, plan.k)
        trials = tuning.reach(key_shards, sample, settings.recall, plan.backend)
    measured |= _temperature(settings, plan, datastores["validation"], key_shards)
    curve = [trial.summary(measured["temperature"], sample) for trial in trials]
    last = curve[-1] if curve else {"recall": 1.0, "total_variation": 0.0}
    measured |= {"recall_at_k": last["recall"], "total_variation": last["total_variation"], "search_curve": curve}
    if trials and trials[-1].options is not None:
        measured["search_options"] = dataclasses.asdict(trials[-1].options)
    say(
        f"targets: temperature {measured['temperature']:.4g}, recall@{plan.k} {measured['recall_at_k']:.3f}, "
        f"total variation {measured['total_variation']:.4f}"
    )
    return measured


def _temperature(settings, plan: Plan, datastore: Artifact, key_shards: KeyShards) -> dict:
    """The temperature that the config gives, or the best one for the validation split."""
    if settings.temperature:
        return {"temperature": settings.temperature}
    queries, packed_QxK = sample_queries(datastore, settings.quality_positions), None
    for number in range(len(key_shards)):
        found_QxK = find_neighbors(key_shards.open(number), queries, plan, "validation")
        packed_QxK = neighbors.merge(packed_QxK, found_QxK)
    choice = temperature.choose(*neighbors.unpack(packed_QxK), queries.next_tokens_Q, queries.base_log_probabilities_Q)
    return {"temperature": choice.temperature, "sample_interpolation_weight": choice.interpolation_weight}


def _measured_once(file: epath.Path, measure, together: bool) -> dict:
    """What `measure()` returns, run by the first process alone or by all together, kept in a file."""
    is_first = jax.process_index() == 0
    if (is_first or together) and not file.exists():
        measured = measure()
        if is_first:
            unfinished = file.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(measured))
            unfinished.replace(file)
    barrier("targets measured")
    return json.loads(file.read_text())


def run(config: ml_collections.ConfigDict) -> dict[str, Artifact]:
    """Makes the target distributions of every split, from neighbors among the keys of the training split.

    Raises:
      UserError: an input is missing or contradicts the config.
    """
    workdir = epath.Path(config.workdir)
    datastores = {split: open_artifact(workdir / "datastore" / split, "datastore") for split in SPLITS}
    settings = _settings(config)
    inputs = {f"datastore/{split}": datastores[split].fingerprint for split in SPLITS}
    folder = workdir / "targets"
    finished = {split: find_finished(folder_of(workdir, split), KIND, settings, inputs) for split in SPLITS}
    if not all(finished.values()):
        _build(config, settings, inputs, datastores, [split for split in SPLITS if not finished[split]])
    else:
        say("targets: finished already")
    if jax.process_index() == 0 and (folder / "scratch").exists():
        (folder / "scratch").rmtree()
    return {split: open_artifact(folder_of(workdir, split), KIND) for split in SPLITS}


def _settings(config: ml_collections.ConfigDict) -> dict:
    """config.targets as manifests keep it, without the keys that change nothing as they stand."""
    settings = {**configs.plain(config.targets), "backend": resolve_backend(config.targets.backend)}
    if not settings["search_dimensions"]:
        del settings["search_dimensions"]
    if settings["recall_target"] == 1:
        del settings["recall_target"]
    return settings


def _build(config, settings: dict, inputs: dict, datastores: dict[str, Artifact], names: list[str]) -> None:
    """Makes the splits `names`; those finished before stay as they are."""
    workdir = epath.Path(config.workdir)
    plan = Plan(**{field.name: settings[field.name] for field in dataclasses.fields(Plan)})
    search = Search.of(settings)
    mesh = Sharding.of(config).mesh if plan.backend == "exact" else None
    _check(plan, search, settings["key_shard_rows"], datastores["train"])
    token_dtype = open_artifact(workdir / "tokens", "tokens").arrays["train"].dtype
    specs = {split: array_specs(datastores[split], token_dtype, plan.entries) for split in names}
    # Indices serve whatever recall is asked for.
    indexed = {key: value for key, value in settings.items() if key != "recall"}
    digest = hashlib.sha256(json.dumps([indexed, inputs], sort_keys=True).encode()).hexdigest()[:12]
    scratch = workdir / "targets" / "scratch" / digest  # what another config left there is not taken for this one's
    scratch.mkdir(parents=True, exist_ok=True)
    key_shards = KeyShards(datastores["train"], settings["key_shard_rows"], scratch, search, mesh)
    if plan.backend == "scann":
        for number in range(jax.process_index(), len(key_shards), jax.process_count()):
            key_shards.open(number)
    barrier("targets indices built")
    measured = _measured_once(
        scratch / f"measured_{settings['recall']:g}.json",
        lambda: _measure(config, plan, datastores, key_shards),
        together=key_shards.are_on_mesh,
    )
    if options := measured.get("search_options"):
        key_shards.use(scann_index.Options(**options))

    # Not before: a build that misses its recall leaves nothing that another one would have to be told apart from.
    writers = {split: TargetsWriter(folder_of(workdir, split), settings, inputs, specs[split]) for split in names}
    splits = [Split(split, datastores[split], writers[split], scratch) for split in names]
    make_tiles(splits, key_shards, plan, measured["temperature"])
    barrier("targets written")
    if jax.process_index() == 0:
        for writer in writers.values():
            writer.seal({**measured, "key_shards": len(key_shards)})
    barrier("targets sealed")


def _check(plan: Plan, search: Search, key_shard_rows: int, datastore: Artifact) -> None:
    """Raises ConfigError where the config does not suit the keys, or a shard of them not this machine."""
    sequences, length, width = datastore.arrays["keys"].shape
    if plan.k >= sequences * length:
        raise ConfigError(
            f"config.targets.k: {plan.k} neighbors of {sequences * length} training positions; lower it, or give more "
            "text"
        )
    if search.search_dimensions >= width:
        raise ConfigError(
            f"config.targets.search_dimensions: expected fewer than the {width} dimensions of the keys, or 0 for all, "
            f"found {search.search_dimensions}"
        )
    sample = min(search.training_sample, sequences * length)
    if search.search_dimensions > sample:
        raise ConfigError(
            f"config.targets.search_dimensions: {search.search_dimensions} cannot be fitted on a sample of {sample} "
            "keys; lower it, or raise config.targets.training_sample"
        )
    rows = min(key_shard_rows, sequences * length)
    key_bytes = np.dtype(datastore.arrays["keys"].dtype).itemsize
    spread = jax.process_count() if jax.device_count() > 1 else 1
    needed, there = host_bytes(rows, width, key_bytes, search, spread), runtime.memory_bytes()
    if needed > there:
        raise ConfigError(
            f"config.targets.key_shard_rows: a shard of {rows:,} keys takes {needed / 2**30:,.1f} GiB of memory in a "
            f"process, this machine has {there / 2**30:,.1f} GiB; lower it to {int(rows * there / needed):,} or less, "
            "or set config.targets.search_dimensions"
        )
    say(f"targets: shards of up to {rows:,} keys take at most {needed / 2**30:,.1f} GiB of memory in a process")
    if plan.exclude == "document":
        first, last = (datastore.read("documents", row, row + 1)[0] for row in (0, sequences - 1))
        if first[0] == last[-1]:
            raise ConfigError(
                "config.targets.exclude: 'document' leaves no neighbors, the training split is a single document; "
                "use 'self', or lower config.corpus.document_bytes"
            )
