"""Checks config, devices and finished artifacts for contradictions before any compute: `mlpmem run` does so before each
stage, and launchers before they submit a job. Imports no accelerator runtime.
"""

from __future__ import annotations

import math
import re

import ml_collections

from mlpmem_jax.core import published
from mlpmem_jax.core.config import as_axes, mesh_rules
from mlpmem_jax.core.errors import ConfigError
from mlpmem_jax.core.manifests import located, read_manifest


def mesh_sizes(config: ml_collections.ConfigDict, devices: int) -> dict[str, int]:
    """The size of each mesh axis for a number of devices, by the rules of `core.mesh.make_mesh`.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    sizes = {axis: config.mesh[axis] for axis in ("slice", "fsdp", "tensor")}
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(open_axes) > 1 or devices % known or (not open_axes and known != devices):
        raise ConfigError(
            f"config.mesh: slice x fsdp x tensor = {' x '.join(map(str, sizes.values()))} does not fit {devices} "
            "devices; the product must be that number, and one of the sizes may be -1 for all the rest"
        )
    return sizes | dict.fromkeys(open_axes, devices // known)


def check_devices(config: ml_collections.ConfigDict, devices: int, processes: int, stage: str = "run") -> None:
    """Checks that the batches of `stage`, and the memory if it trains one, are divisible by the job's devices and
    processes.

    Raises:
      ConfigError: names every batch or dimension that is not, or sharding rules that training does not support.
    """
    sizes, rules = mesh_sizes(config, devices), mesh_rules(config)
    axes = {name: as_axes(rule) for name, rule in rules.items()}
    shards = {name: math.prod(sizes[axis] for axis in mesh_axes) for name, mesh_axes in axes.items()}
    _check_rules(axes, devices)
    wrong = []
    for name, group in _batches(config, stage).items():
        multiple = math.lcm(shards["batch"] * group.get("accumulation_steps", 1), processes)
        if group.batch_sequences % multiple:
            wrong.append(
                f"config.{name}.batch_sequences: expected a multiple of {multiple}, found {group.batch_sequences}; "
            )
    if wrong:
        raise ConfigError(
            f"{''.join(wrong)}an accumulation step is divided evenly over {shards['batch']} batch shards of "
            f"the mesh, a whole step over {processes} processes"
        )
    memory = _dimensions_of_memory(config) if stage in ("run", "train", "controls") else []
    for key, axis, size in memory:
        if size % shards[axis]:
            raise ConfigError(
                f"config.{key}: {size} cannot be divided into {shards[axis]} equal shards, over the mesh axes "
                f"{'+'.join(axes[axis])} of config.mesh.rules.{axis}; use a multiple, other sizes of config.mesh, or "
                f"another rule"
            )


def _batches(config: ml_collections.ConfigDict, stage: str) -> dict[str, ml_collections.ConfigDict]:
    """The groups, by name, whose batches `stage` divides over the mesh."""
    trains_base = config.base.source == "train"  # then with its own settings, also where it is continued
    compared = re.split("[,+]", config.comparison.systems) if stage == "compare" else []
    continues_base = stage == "controls" or "cpt" in compared
    groups = {}
    if stage in ("run", "datastore"):
        groups["datastore"] = config.datastore
    if stage in ("run", "train", "controls", "continued") or "lora" in compared or (continues_base and not trains_base):
        groups["training"] = config.training
    if (stage in ("run", "base") and (trains_base or config.base.finetune_steps)) or (continues_base and trains_base):
        groups["base.training"] = config.base.training
    return groups


def _check_rules(axes: dict[str, tuple[str, ...]], devices: int) -> None:
    """The same check as `core.sharding.Sharding.check_collectives`, which training does when it starts."""
    batch, embed, mlp, vocab = (set(axes[name]) for name in ("batch", "embed", "mlp", "vocab"))
    if devices > 1 and (not embed <= batch or (mlp | vocab) & batch):
        raise ConfigError(
            f"config.mesh.rules: the axes of 'embed' {axes['embed']} must be among those of 'batch' {axes['batch']}, "
            f"and those of 'mlp' {axes['mlp']} and 'vocab' {axes['vocab']} must not"
        )


def _dimensions_of_memory(config: ml_collections.ConfigDict) -> list[tuple[str, str, int]]:
    """(key, logical axis, size) of each dimension that the mesh must divide."""
    width, feed_forward = config.memory.width, config.memory.feed_forward_width
    dimensions = [
        ("memory.width", "embed", width),
        ("memory.feed_forward_width", "mlp", feed_forward) if feed_forward else ("memory.width", "mlp", 4 * width),
    ]
    if config.base.source == "train" and config.base.width != width:  # also a width of the memory's first matrix
        dimensions.append(("base.width", "embed", config.base.width))
    return dimensions


def check_models(config: ml_collections.ConfigDict, devices: int) -> None:
    """Checks the config against the published dimensions of the models that it names, before they are downloaded.

    Raises:
      ConfigError: a key does not match them, or the mesh does not divide the width that the memory reads.
    """
    if config.base.source != "huggingface" or (base := published.find(config.base.path)) is None:
        return
    name = f"config.base.path={config.base.path}"
    sizes = mesh_sizes(config, devices)
    shards = math.prod(sizes[axis] for axis in as_axes(mesh_rules(config)["embed"]))
    if config.memory.width != base["width"] and base["width"] % shards:
        raise ConfigError(
            f"{name}: the memory reads its width, {base['width']}, which cannot be divided into {shards} equal shards; "
            "use other sizes of config.mesh: a larger config.mesh.tensor leaves fewer devices to fsdp"
        )
    if config.base.context_length > base["context_length"]:
        raise ConfigError(
            f"config.base.context_length: {config.base.context_length} is longer than the {base['context_length']} "
            f"positions of {name}"
        )
    keys = published.find(config.datastore.key_model) or base
    if keys["vocab_size"] != base["vocab_size"]:
        raise ConfigError(
            f"config.datastore.key_model: {config.datastore.key_model} has a vocabulary of {keys['vocab_size']}, "
            f"{name} of {base['vocab_size']}; both must use the same tokenizer"
        )
    _check_width(config, base["width"])


def check_artifacts(config: ml_collections.ConfigDict) -> None:
    """Checks the config against the finished artifacts of its workdir, and the memory to start from.

    Raises:
      ConfigError: a key does not match the tokens, the base or that memory.
      ArtifactError: an artifact's folder is not an artifact.
    """
    tokens, base = (_finished(f"{config.workdir}/{folder}") for folder in ("tokens", "base"))
    if tokens is not None:
        _check_tokens(config, tokens)
    if base is not None and config.base.source != "train":  # the config gives the width of a base trained here
        _check_width(config, base["summary"]["model"]["width"])
    if config.training.start:
        _check_start(config, _finished(config.training.start))


def _finished(path: str) -> dict | None:
    manifest = read_manifest(located(path))
    return manifest if manifest is not None and manifest["sealed"] else None


def _check_tokens(config: ml_collections.ConfigDict, manifest: dict) -> None:
    tokens = {
        split: sum(shard["arrays"][split]["shape"][-1] for shard in manifest["shards"])
        for split in ("train", "validation", "test")
    }
    for split, count in tokens.items():
        if count <= config.base.context_length:
            raise ConfigError(
                f"config.base.context_length: {config.base.context_length} positions and their last target are more "
                f"than the {count:,} tokens of the {split} split; lower it, or provide more text"
            )
    sequences = (tokens["train"] - 1) // config.base.context_length
    positions = sequences * config.base.context_length
    there = f"the training split has {positions:,} positions in {sequences:,} sequences"
    if config.targets.k >= positions:
        raise ConfigError(f"config.targets.k: {config.targets.k} neighbors, but {there}; lower it or add text")
    if config.targets.exclude == "document" and manifest["summary"]["documents"]["train"] < 2:
        raise ConfigError(
            "config.targets.exclude: 'document' leaves no neighbors: the training split is a single document; use "
            "'self', or provide more files"
        )
    sample = min(config.targets.training_sample, positions)
    if config.targets.search_dimensions > sample:
        raise ConfigError(
            f"config.targets.search_dimensions: {config.targets.search_dimensions} cannot be fitted on a sample of "
            f"{sample} keys; lower it, or raise config.targets.training_sample"
        )
    trainings = {"training": config.training}
    if config.base.source == "train" or config.base.finetune_steps:
        trainings["base.training"] = config.base.training
    for name, settings in trainings.items():
        if sequences < settings.batch_sequences:
            raise ConfigError(
                f"config.{name}.batch_sequences: {settings.batch_sequences} sequences per step, but {there}; lower "
                "it, or provide more text"
            )
        if name == "base.training" and config.base.finetune_steps:
            continue  # its warmup is limited to a tenth
        steps = settings.steps or round(settings.epochs * sequences / settings.batch_sequences)
        if steps <= settings.warmup_steps:
            raise ConfigError(
                f"config.{name}.warmup_steps: {settings.warmup_steps} steps of warmup leave none of the {steps} steps "
                f"of config.{name}.epochs={settings.epochs} to train at the full rate ({there}); lower warmup_steps or "
                "train longer"
            )


def _check_width(config: ml_collections.ConfigDict, width: int) -> None:
    if config.memory.output_from_base and config.memory.width != width:
        raise ConfigError(
            f"config.memory.output_from_base: needs config.memory.width ({config.memory.width}) equal to the base's "
            f"width ({width})"
        )
    if not config.datastore.key_model and config.targets.search_dimensions >= width:
        raise ConfigError(
            f"config.targets.search_dimensions: expected fewer than the {width} dimensions of the keys, or 0 for all, "
            f"found {config.targets.search_dimensions}"
        )


def _check_start(config: ml_collections.ConfigDict, manifest: dict | None) -> None:
    start = config.training.start
    if manifest is None or manifest["kind"] != "memory":
        raise ConfigError(f"config.training.start: expected a folder with a finished memory, found none at {start}")
    stored, memory = manifest["summary"]["model"], config.memory
    defaults = {"feed_forward_width": memory.feed_forward_width or 4 * memory.width}
    for name in ("family", "width", "blocks", "feed_forward_width"):
        if stored[name] != (expected := defaults.get(name, memory[name])):
            raise ConfigError(
                f"config.training.start: {start} has {name} {stored[name]}, the config asks for {expected}; set "
                f"config.memory.{name} to its value"
            )
