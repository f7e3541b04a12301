"""What config, devices and finished artifacts contradict, told before any compute: by `mlpmem run` before each stage,
and by the launchers before they send a job. Imports no accelerator runtime.
"""

from __future__ import annotations

import math

import ml_collections

from mlpmem_jax.core import config as configs
from mlpmem_jax.core.errors import ConfigError
from mlpmem_jax.core.manifests import located, read_manifest


def mesh_sizes(config: ml_collections.ConfigDict, devices: int) -> dict[str, int]:
    """The size of each mesh axis on so many devices, by the rule of `core.mesh.make_mesh`.

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


def check_devices(config: ml_collections.ConfigDict, devices: int, processes: int) -> None:
    """Checks that mesh and batches divide over the devices and processes that they will meet.

    Raises:
      ConfigError: naming every batch that does not.
    """
    sizes = mesh_sizes(config, devices)
    axes = configs.mesh_rules(config)["batch"] or ()
    shards = math.prod(sizes[axis] for axis in ([axes] if isinstance(axes, str) else axes))
    groups = {"datastore": config.datastore, "training": config.training}
    if config.base.source == "train":
        groups["base.training"] = config.base.training
    wrong = []
    for name, group in groups.items():
        unit = math.lcm(shards * group.get("accumulation_steps", 1), processes)
        if group.batch_sequences % unit:
            wrong.append(
                f"config.{name}.batch_sequences: expected a multiple of {unit}, found {group.batch_sequences}; "
            )
    if wrong:
        raise ConfigError(
            f"{''.join(wrong)}an accumulation step is shared out evenly over {shards} batch shards of "
            f"the mesh, a whole step over {processes} processes"
        )


def check_artifacts(config: ml_collections.ConfigDict) -> None:
    """Checks the config against what the finished artifacts of its workdir say.

    Raises:
      ConfigError: a key does not fit the tokens or the base, or an artifact is no artifact.
    """
    tokens, base = (_finished(config, folder) for folder in ("tokens", "base"))
    if tokens is not None:
        _check_tokens(config, tokens)
    if base is not None and config.base.source != "train":  # of a trained base the config says its width
        _check_width(config, base["summary"]["model"]["width"])


def _finished(config: ml_collections.ConfigDict, folder: str) -> dict | None:
    manifest = read_manifest(located(f"{config.workdir}/{folder}"))
    return manifest if manifest is not None and manifest["sealed"] else None


def _check_tokens(config: ml_collections.ConfigDict, manifest: dict) -> None:
    tokens = sum(shard["arrays"]["train"]["shape"][-1] for shard in manifest["shards"])
    sequences = max(tokens - 1, 0) // config.base.context_length
    positions = sequences * config.base.context_length
    there = f"the training split has {positions:,} positions in {sequences:,} sequences"
    if config.targets.k >= positions:
        raise ConfigError(f"config.targets.k: {config.targets.k} neighbors, but {there}; lower it, or give more text")
    if config.targets.exclude == "document" and manifest["summary"]["documents"]["train"] < 2:
        raise ConfigError(
            "config.targets.exclude: 'document' leaves no neighbors, the training split is a single document; use "
            "'self', or give more files"
        )
    sample = min(config.targets.training_sample, positions)
    if config.targets.search_dimensions > sample:
        raise ConfigError(
            f"config.targets.search_dimensions: {config.targets.search_dimensions} cannot be fitted on a sample of "
            f"{sample} keys; lower it, or raise config.targets.training_sample"
        )
    trainings = {"training": config.training}
    if config.base.source == "train":
        trainings["base.training"] = config.base.training
    for name, settings in trainings.items():
        if sequences < settings.batch_sequences:
            raise ConfigError(
                f"config.{name}.batch_sequences: {settings.batch_sequences} sequences in a step, but {there}; lower "
                "it, or give more text"
            )
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
