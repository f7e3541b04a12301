"""Continued training of the base LM without a memory, for the same compute (the paper's GPT2-ConTrain).

It is used in two places: as a control of one run, and as the arm `continued` of a scaling sweep. An imported base is
fine-tuned the same way before anything else is built from it.
"""

from __future__ import annotations

import ml_collections
import numpy as np
from etils import epath

from mlpmem_jax.core.artifacts import Artifact, ArtifactWriter, find_finished, open_artifact
from mlpmem_jax.core.errors import UserError
from mlpmem_jax.core.progress import progress, say
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.corpus.tokens import TokenStream, num_sequences, read_sequences
from mlpmem_jax.models import language_model, saved
from mlpmem_jax.models.interpolation import perplexity
from mlpmem_jax.models.scoring import chunk_positions, language_model_log_probabilities
from mlpmem_jax.training import loop, rate_search, train_base

FOLDER = "continued"
RATES = (1e-5, 3e-5, 1e-4, 3e-4)
"""Peak learning rates to try for a base that was trained elsewhere."""

_CHUNKS_AT_ONCE = 4  # of `scoring`, per step of the progress


def run(config: ml_collections.ConfigDict) -> Artifact:
    """Continues training the base of `config.workdir` for as long as `config.training` says, and scores it.

    Raises:
      UserError: the base is not finished, or does not match the config.
    """
    settings, rates = of_arm(config)
    if rates and not settings.steps:
        stream = TokenStream(open_artifact(epath.Path(config.workdir) / "tokens", "tokens"), "train")
        steps = loop.total_steps(settings, num_sequences(stream, config.base.context_length))
        settings = small_steps(settings, steps)
    return train_on(config, settings, FOLDER, {}, "training", rates=rates)


def of_arm(config: ml_collections.ConfigDict) -> tuple[ml_collections.ConfigDict, tuple[float, ...]]:
    """The settings of a sweep's arm `continued`, and the learning rates it chooses from, if any.

    A base that was trained here continues with `config.training`. For an imported one the rate of a memory is too high;
    it takes the best of a few small ones, with AdamW, as controls do.
    """
    settings = settings_of(config)
    return (settings, ()) if config.base.source == "train" else (small_steps(settings, settings.steps), RATES)


def origin(config: ml_collections.ConfigDict, settings: ml_collections.ConfigDict, rates: tuple[float, ...]) -> dict:
    """What the result of `train_on` depends on, apart from artifacts, for its manifest."""
    training = loop.origin(settings) | ({"learning_rate": list(rates)} if rates else {})
    return {"training": training, "context_length": config.base.context_length}


def settings_of(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """`config.training` without the keys that apply only to a memory."""
    of_a_memory = ("mode", "alpha")
    return ml_collections.ConfigDict({key: value for key, value in config.training.items() if key not in of_a_memory})


def small_steps(settings: ml_collections.ConfigDict, steps: int) -> ml_collections.ConfigDict:
    """Settings for continuing an imported base: AdamW, warmup of at most a tenth, and a learning rate from RATES."""
    settings = ml_collections.ConfigDict(settings)
    settings.update({"optimizer": "adamw", "steps": steps, "warmup_steps": min(settings.warmup_steps, steps // 10)})
    return settings


def finetune(config: ml_collections.ConfigDict, source: str) -> Artifact:
    """Trains an imported base on the corpus, into `base`, for `config.base.finetune_steps`.

    Args:
      config: the whole config.
      source: folder of `config.workdir` with the imported base.

    Raises:
      UserError: it is not finished, or does not match the config.
    """
    settings = small_steps(config.base.training, config.base.finetune_steps)
    tokens = open_artifact(epath.Path(config.workdir) / "tokens", "tokens")
    inputs = {"tokens": tokens.fingerprint}
    return train_on(config, settings, "base", inputs, "base.training", source=source, rates=RATES)


def steps_with_rate_search(steps: int) -> int:
    """Total optimizer steps of a training of `steps`, including those that choose its learning rate."""
    return rate_search.total_steps(steps, RATES)


def flops_of_memory(memory: Artifact, base: Artifact) -> float:
    """Training FLOPs of a memory, which training without one is compared at.

    Raises:
      ArtifactError: the memory was made from another base.
      UserError: the memory, or the one that it was started from, was imported, so that its training cost is unknown.
    """
    memory.check_made_from({"base": base})
    if "training_flops" not in memory.summary:
        how = "started from an imported one" if "start" in memory.inputs else "imported"
        raise UserError(f"{memory.path}: was {how}, so its training cost, which the comparison needs, is unknown")
    return memory.summary["training_flops"]


def flops_per_step(model: language_model.Config, length: int, settings: ml_collections.ConfigDict) -> int:
    """Training FLOPs of one optimizer step on sequences of `length` positions."""
    return 3 * language_model.forward_flops(model, length) * settings.batch_sequences * length


def train_on(
    config: ml_collections.ConfigDict,
    settings: ml_collections.ConfigDict,
    name: str,
    inputs: dict[str, str],
    group: str,
    *,
    source: str = "base",
    rates: tuple[float, ...] = (),
) -> Artifact:
    """Continues training a finished base from its best parameters, with a fresh optimizer and schedule.

    Keeps the parameters that are best on validation, which may be the base's own.

    Args:
      config: the whole config.
      settings: settings of the training, a config group made by `optimization` of configs/default.py.
      name: folder of `config.workdir` for the result.
      inputs: fingerprints of artifacts that the settings depend on.
      group: the config's name for `settings`.
      source: folder of `config.workdir` with the finished base.
      rates: peak learning rates to choose from, instead of the one in `settings`.

    Returns:
      An artifact of kind "base" whose summary also has training_flops, and perplexity by held-out split; if a rate
      was chosen, also what `rate_search.best_of` adds. training_flops does not include rate_search_flops.
    """
    workdir = epath.Path(config.workdir)
    sharding = Sharding.of(config)
    artifact = open_artifact(workdir / source, "base")
    model, length = saved.language_model_config(artifact), config.base.context_length
    kept, inputs = origin(config, settings, rates), {source: artifact.fingerprint, **inputs}
    if finished := find_finished(workdir / name, "base", kept, inputs):
        rate_search.remove_runs(finished.path)
        say(f"{name}: already finished")
        return finished
    writer = ArtifactWriter.create(workdir / name, "base", kept, inputs, {})
    tokens = open_artifact(workdir / "tokens", "tokens")

    def perplexities(parameters, what: str) -> dict[str, float]:
        return held_out_perplexities(config, parameters, model, tokens, sharding, f"{name}: {what}")

    def load() -> tuple:
        return saved.load_language_model(artifact.path, sharding)[:1]

    def train(settings: ml_collections.ConfigDict, name: str, folder: str) -> tuple[dict, dict]:
        return train_base.train(
            config,
            settings,
            model,
            lambda parameters: parameters,
            name=name,
            folder=folder,
            group=group,
            start=load,
        )

    # Measured first, so that two sets of parameters are never in memory together.
    before = perplexities(*load(), source)
    per_step = flops_per_step(model, length, settings)
    if rates:
        best, summary = rate_search.best_of(
            rates, settings, train, name=name, folder=writer.path, flops_per_step=per_step
        )
    else:
        best, summary = train(settings, name, writer.path)
    summary["training_flops"] = float(per_step) * summary["steps"]
    summary["perplexity"] = perplexities(best, "trained")
    # More training may only harm a base that was trained on better text; then the base itself is the result.
    if before["validation"] <= summary["perplexity"]["validation"]:
        say(f"{name}: no step improved on the base's validation perplexity, so the base is kept")
        best, summary["step"], summary["perplexity"] = None, 0, before
        (best,) = load()
    sealed = saved.seal(writer, model, best, summary)
    rate_search.remove_runs(writer.path)
    return sealed


def held_out_perplexities(
    config: ml_collections.ConfigDict,
    parameters: dict,
    model: language_model.Config,
    tokens: Artifact,
    sharding: Sharding,
    name: str,
) -> dict[str, float]:
    """Perplexity on the validation and test splits, computed in the dtype in which base and memory are scored."""
    return {
        split: _perplexity(config, parameters, model, TokenStream(tokens, split), sharding, f"{name} on {split}")
        for split in ("validation", "test")
    }


def _perplexity(config, parameters, model, stream: TokenStream, sharding: Sharding, name: str) -> float:
    """Perplexity over all whole sequences of a split."""
    length, scores = config.base.context_length, []
    computed = {"sharding": sharding, "compute_dtype": config.datastore.compute_dtype}
    count = num_sequences(stream, length)
    at_once = _CHUNKS_AT_ONCE * max(1, chunk_positions(model.vocab_size, sharding) // length)
    with progress(count * length, name, "positions") as bar:
        for first in range(0, count, at_once):
            tokens_SxT, next_SxT, _ = read_sequences(stream, first, min(at_once, count - first), length)
            scores_SxT = language_model_log_probabilities(parameters, model, tokens_SxT, next_SxT, **computed)
            scores.append(np.ravel(scores_SxT))
            bar.advance(tokens_SxT.size)
    return float(perplexity(np.concatenate(scores)))
