"""Low-rank adaptation of the base LM (Hu et al., 2022): a system of the paper's comparison, beside the memory.

Every adapted matrix W becomes W + s A B. The paper adapts the projections to queries, keys and values and those of the
feed-forward layers, not the attention's output, and takes the rank at which the adapters have the memory's parameters.
Training forms W + s A B and differentiates through it, so that any language model can be adapted without a line in its
module; what is stored as the artifact is the merged model, and A and B beside it for export.

Dimensions: L blocks, I inputs of a matrix, R rank, the rest its outputs, one axis or several.
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
from mlpmem_jax.core.progress import say
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.models import flops, language_model, saved
from mlpmem_jax.models.memory import MemoryConfig
from mlpmem_jax.training import base, equal_compute, loop

FOLDER = "lora"
ADAPTERS = "adapters"
SCALE = 2.0  # s = alpha / rank with the usual alpha of twice the rank
_LEFT_OUT = (("attn", "c_proj"), ("self_attn", "o_proj"))  # the attention's outputs
_RATES = (1e-4, 3e-4, 1e-3)  # peak learning rates that are tried


def adapted(logical_axes: dict) -> dict[tuple[str, ...], tuple[str | None, ...]]:
    """{path of a kernel in the stacked blocks: its logical axes} of all matrices that are adapted."""
    found = {}
    for path, axes in jax.tree_util.tree_leaves_with_path(logical_axes["h"], is_leaf=lambda x: isinstance(x, tuple)):
        names = tuple(entry.key for entry in path)
        if names[-1] == "kernel" and names[:2] not in _LEFT_OUT:
            found[names] = axes
    return found


def adapter_axes(logical_axes: dict) -> dict:
    """Logical axes of the adapters: {"path.of.kernel": {"a": [L, I, R], "b": [L, R, ...]}}."""
    return {
        ".".join(path): {"a": (axes[0], axes[1], None), "b": (axes[0], None, *axes[2:])}
        for path, axes in adapted(logical_axes).items()
    }


def _kernel(parameters: dict, path: str) -> jax.Array:
    for name in ("h", *path.split(".")):
        parameters = parameters[name]
    return parameters


def parameters_per_rank(abstract: dict, logical_axes: dict) -> int:
    """Parameters of all adapters together for each unit of rank."""
    shapes = [_kernel(abstract, ".".join(path)).shape for path in adapted(logical_axes)]
    return sum(blocks * (inputs + math.prod(outputs)) for blocks, inputs, *outputs in shapes)


def init(abstract: dict, logical_axes: dict, rank: int, key: jax.Array) -> dict:
    """Fresh adapters, float32: A uniform within 1 / sqrt(I), B zero, so that the model starts as it is."""
    adapters = {}
    for number, path in enumerate(adapter_axes(logical_axes)):
        blocks, inputs, *outputs = _kernel(abstract, path).shape
        reach = inputs**-0.5
        a_LxIxR = jax.random.uniform(
            jax.random.fold_in(key, number), (blocks, inputs, rank), minval=-reach, maxval=reach
        )
        adapters[path] = {"a": a_LxIxR, "b": jnp.zeros((blocks, rank, *outputs))}
    return adapters


def merge(parameters: dict, adapters: dict) -> dict:
    """The language model's parameters with W + s A B in place of each adapted W."""
    blocks = jax.tree.map(lambda array: array, parameters["h"])  # new dictionaries, the same arrays
    for path, adapter in adapters.items():
        *module, leaf = path.split(".")
        parent = functools.reduce(lambda tree, name: tree[name], module, blocks)
        b_LxRxO = adapter["b"].reshape(*adapter["b"].shape[:2], -1)
        delta = SCALE * jnp.einsum("lir,lro->lio", adapter["a"], b_LxRxO)
        parent[leaf] = parent[leaf] + delta.reshape(parent[leaf].shape)
    return {**parameters, "h": blocks}


def run(config: ml_collections.ConfigDict) -> Artifact:
    """Adapts the base of `config.workdir` with as many parameters and training FLOPs as its memory has.

    The learning rate is the best on validation of three short runs, an eighth of the steps each.

    Returns:
      An artifact of kind "base", the merged model; its summary also holds rank and adapter_parameters.

    Raises:
      UserError: the memory is not finished, or was imported, so that its training cost is not known.
    """
    workdir = epath.Path(config.workdir)
    memory, artifact = open_artifact(workdir / "memory", "memory"), open_artifact(workdir / "base", "base")
    model = saved.language_model_config(artifact)
    abstract = jax.eval_shape(functools.partial(language_model.init, model), jax.random.key(0))
    logical_axes = language_model.logical_axes(model)
    count = flops.memory_parameters(MemoryConfig(**memory.summary["model"]), output_projection=False)
    rank = max(1, round(count / parameters_per_rank(abstract, logical_axes)))
    settings, inputs = equal_compute.settings_for(config, memory, artifact), {"memory": memory.fingerprint}
    kept = {"training": loop.origin(settings), "rank": rank}
    if finished := find_finished(workdir / FOLDER, "base", kept, {"base": artifact.fingerprint, **inputs}):
        say(f"{FOLDER}: finished already")
        return finished

    def train(name: str, settings: ml_collections.ConfigDict, folder: str):
        return base.train(
            config,
            settings,
            name,
            folder,
            model,
            initialise=functools.partial(init, abstract, logical_axes, rank, jax.random.key(settings.seed)),
            group="training",
            frozen=saved.load_language_model(artifact.path, Sharding.of(config))[0],
            assemble=merge,
            logical_axes=adapter_axes(logical_axes),
        )

    say(f"{FOLDER}: rank {rank}, {rank * parameters_per_rank(abstract, logical_axes):,} parameters")
    perplexities = {}
    for rate in _RATES:
        short = equal_compute.shortened(settings, rate)
        folder = workdir / f"{FOLDER}_rates" / f"{rate:g}"
        made_of = {"training": loop.origin(short), "rank": rank}, {"base": artifact.fingerprint, **inputs}
        tried = find_finished(folder, "rate", *made_of)
        if tried is None:
            writer = ArtifactWriter.create(folder, "rate", *made_of, {})
            _, figures = train(f"{FOLDER}, rate {rate:g}", short, writer.path)
            tried = writer.seal({"perplexity": figures["validation"]["perplexity"]})
        perplexities[rate] = tried.summary["perplexity"]
    settings.learning_rate = min(perplexities, key=perplexities.get)
    say(f"{FOLDER}: learning rate {settings.learning_rate:g}; validation perplexity of short runs: {perplexities}")

    writer = ArtifactWriter.create(workdir / FOLDER, "base", kept, {"base": artifact.fingerprint, **inputs}, {})
    adapters, figures = train(FOLDER, settings, writer.path)
    figures |= {
        "rank": rank,
        "adapter_parameters": rank * parameters_per_rank(abstract, logical_axes),
        "learning_rate": settings.learning_rate,
        "validation_of_short_runs": {f"{rate:g}": value for rate, value in perplexities.items()},
        "training_flops": figures["steps"] * equal_compute.flops_per_step(model, settings, config.base.context_length),
    }
    stored.write(epath.Path(writer.path) / ADAPTERS, adapters)
    parameters = saved.load_language_model(artifact.path, Sharding.of(config))[0]
    saved.seal(writer, model, jax.jit(merge, donate_argnums=0)(parameters, adapters), figures)
    return open_artifact(workdir / FOLDER, "base")
