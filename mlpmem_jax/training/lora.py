"""Low-rank adaptation of the base LM (Hu et al., 2022), one of the systems in the paper's comparison.

Every adapted matrix W becomes W + s A B. As in the paper, these are the query, key and value projections and the
feed-forward layers, but not the attention's output projection; the rank is chosen so that the adapters have as many
parameters as the memory. Training computes W + s A B and differentiates through it, so any language model can be
adapted without changing its module. The artifact is the merged model, with A and B stored next to it for export.

Dimensions: L blocks, I inputs of a matrix, Y rank; the remaining axes, one or several, are its outputs.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import ml_collections
from etils import epath

from mlpmem_jax.core import parameters as stored
from mlpmem_jax.core.artifacts import Artifact, ArtifactWriter, find_finished, open_artifact
from mlpmem_jax.core.mesh import barrier
from mlpmem_jax.core.progress import say
from mlpmem_jax.core.sharding import Sharding, is_axes
from mlpmem_jax.models import flops, language_model, saved
from mlpmem_jax.models.memory import MemoryConfig
from mlpmem_jax.training import continued, rate_search, train_base

FOLDER = "lora"
ADAPTERS = "adapters"
SCALE = 2.0  # s = alpha / rank, with the usual alpha = 2 * rank
_LEFT_OUT = (("attn", "c_proj"), ("self_attn", "o_proj"))  # the attention's output projections
_RATES = (1e-4, 3e-4, 1e-3)  # peak learning rates to try


def adapted(logical_axes: dict) -> dict[tuple[str, ...], tuple[str | None, ...]]:
    """{path of a kernel in the stacked blocks: its logical axes} for all adapted matrices."""
    result = {}
    for path, axes in jax.tree_util.tree_leaves_with_path(logical_axes["h"], is_leaf=is_axes):
        names = tuple(entry.key for entry in path)
        if names[-1] == "kernel" and names[:2] not in _LEFT_OUT:
            result[names] = axes
    return result


def adapter_axes(logical_axes: dict) -> dict:
    """Logical axes of the adapters: {"path.of.kernel": {"a": [L, I, Y], "b": [L, Y, ...]}}."""
    return {
        ".".join(path): {"a": (axes[0], axes[1], None), "b": (axes[0], None, *axes[2:])}
        for path, axes in adapted(logical_axes).items()
    }


def _kernel(parameters: dict, path: str) -> jax.Array:
    for name in ("h", *path.split(".")):
        parameters = parameters[name]
    return parameters


def parameters_per_rank(abstract: dict, logical_axes: dict) -> int:
    """Parameters of all adapters together, per unit of rank."""
    shapes = [_kernel(abstract, ".".join(path)).shape for path in adapted(logical_axes)]
    return sum(blocks * (inputs + math.prod(outputs)) for blocks, inputs, *outputs in shapes)


def init(abstract: dict, logical_axes: dict, rank: int, key: jax.Array) -> dict:
    """Fresh adapters, float32: A uniform within 1 / sqrt(I), B zero, so that the model is initially unchanged."""
    adapters = {}
    for number, path in enumerate(adapter_axes(logical_axes)):
        blocks, inputs, *outputs = _kernel(abstract, path).shape
        reach = inputs**-0.5
        a_LxIxY = jax.random.uniform(
            jax.random.fold_in(key, number), (blocks, inputs, rank), minval=-reach, maxval=reach
        )
        adapters[path] = {"a": a_LxIxY, "b": jnp.zeros((blocks, rank, *outputs))}
    return adapters


def merge(parameters: dict, adapters: dict) -> dict:
    """The language model's parameters, with each adapted W replaced by W + s A B."""
    blocks = jax.tree.map(lambda array: array, parameters["h"])  # new dictionaries, the same arrays
    for path, adapter in adapters.items():
        *module, leaf = path.split(".")
        parent = functools.reduce(lambda tree, name: tree[name], module, blocks)
        b_LxYxO = adapter["b"].reshape(*adapter["b"].shape[:2], -1)
        delta = SCALE * jnp.einsum("liy,lyo->lio", adapter["a"], b_LxYxO)
        parent[leaf] = parent[leaf] + delta.reshape(parent[leaf].shape)
    return {**parameters, "h": blocks}


def run(config: ml_collections.ConfigDict) -> Artifact:
    """Adapts the base of `config.workdir` with as many parameters and training FLOPs as its memory.

    It is trained like an imported base is trained further, with the best of three learning rates on validation. Keeps
    the parameters that are best on validation, which may be the base's own.

    Returns:
      An artifact of kind "base", the merged model, with the adapters in a subfolder; its summary has that of
      `continued.train_on`, plus rank and adapter_parameters.

    Raises:
      UserError: the memory is not finished, or was imported, so that its training cost is unknown.
    """
    workdir, sharding = epath.Path(config.workdir), Sharding.of(config)
    memory, artifact = open_artifact(workdir / "memory", "memory"), open_artifact(workdir / "base", "base")
    tokens = open_artifact(workdir / "tokens", "tokens")
    training_flops = continued.flops_of_memory(memory, artifact)
    model, length = saved.language_model_config(artifact), config.base.context_length
    abstract = language_model.abstract_parameters(model)
    logical_axes = language_model.logical_axes(model)
    per_rank = parameters_per_rank(abstract, logical_axes)
    wanted = flops.memory_parameters(MemoryConfig(**memory.summary["model"]), output_projection=False)
    rank = max(1, round(wanted / per_rank))

    per_step = continued.flops_per_step(model, length, config.training)
    steps = max(1, round(training_flops / per_step))
    settings = continued.small_steps(continued.settings_of(config), steps)
    kept = {**continued.origin(config, settings, _RATES), "rank": rank, "scale": SCALE}
    inputs = {"base": artifact.fingerprint, "memory": memory.fingerprint}
    if finished := find_finished(workdir / FOLDER, "base", kept, inputs):
        rate_search.remove_runs(finished.path)
        say(f"{FOLDER}: already finished")
        return finished
    say(f"{FOLDER}: rank {rank}, {rank * per_rank:,} parameters; the memory's blocks have {wanted:,}")
    writer = ArtifactWriter.create(workdir / FOLDER, "base", kept, inputs, {})
    (frozen, *_) = saved.load_language_model(artifact.path, sharding)

    over_base = train_base.Adapters(frozen, merge, adapter_axes(logical_axes))

    def train(settings: ml_collections.ConfigDict, name: str, folder: str) -> tuple[dict, dict]:
        initialize = functools.partial(init, abstract, logical_axes, rank, jax.random.key(settings.seed))
        return train_base.train(
            config,
            settings,
            model,
            initialize,
            name=name,
            folder=folder,
            group="training",
            adapters=over_base,
        )

    before = continued.held_out_perplexities(config, frozen, model, tokens, sharding, f"{FOLDER}: base")
    adapters, metrics = rate_search.best_of(
        _RATES, settings, train, name=FOLDER, folder=writer.path, flops_per_step=per_step
    )
    merged = jax.jit(merge)(frozen, adapters)
    after = continued.held_out_perplexities(config, merged, model, tokens, sharding, f"{FOLDER}: adapted")
    if before["validation"] <= after["validation"]:
        say(f"{FOLDER}: no step improved on the base's validation perplexity, so the base is kept")
        adapters, merged, metrics["step"], after = jax.tree.map(jnp.zeros_like, adapters), frozen, 0, before
    metrics["training_flops"], metrics["perplexity"] = float(per_step) * metrics["steps"], after
    metrics["rank"], metrics["adapter_parameters"] = rank, rank * per_rank
    _seal_adapters(writer, adapters, kept, inputs)
    sealed = saved.seal(writer, model, merged, metrics)
    rate_search.remove_runs(writer.path)
    return sealed


def _seal_adapters(writer: ArtifactWriter, adapters: dict, settings: dict, inputs: dict[str, str]) -> None:
    """Writes the adapters as a separate artifact inside that of the merged model."""
    within = ArtifactWriter.create(epath.Path(writer.path) / ADAPTERS, ADAPTERS, settings, inputs, {})
    stored.write(within.path, adapters)
    summary = {"parameters_fingerprint": stored.fingerprint(adapters)}
    if jax.process_index() == 0:
        within.seal(summary)
    barrier("adapters sealed")


def load_adapters(artifact: Artifact, sharding: Sharding) -> dict:
    """Loads the adapters of a finished LoRA onto the mesh.

    Raises:
      ArtifactError: they are missing or damaged.
    """
    model = saved.language_model_config(artifact)
    logical_axes = language_model.logical_axes(model)
    abstract = language_model.abstract_parameters(model)
    rank = artifact.summary["rank"]
    adapters = jax.eval_shape(functools.partial(init, abstract, logical_axes, rank), jax.random.key(0))
    within = open_artifact(epath.Path(artifact.path) / ADAPTERS, ADAPTERS)
    return stored.read(within, adapters, sharding.tree(adapter_axes(logical_axes), adapters))
