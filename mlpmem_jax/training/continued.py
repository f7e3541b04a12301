"""The base LM trained on, without a memory: what the same compute gives by itself (GPT2-ConTrain of the paper).

It stands beside a memory in two places: as a control of one run, and as the arm `continued` of a scaling sweep.
"""

from __future__ import annotations

import ml_collections
import numpy as np
from etils import epath

from mlpmem_jax.core.artifacts import Artifact, ArtifactWriter, find_finished, open_artifact
from mlpmem_jax.core.progress import say
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.corpus.tokens import TokenStream, num_sequences, read_sequences
from mlpmem_jax.models import flops, saved
from mlpmem_jax.models.interpolation import perplexity
from mlpmem_jax.models.scoring import language_model_log_probabilities
from mlpmem_jax.training import base, loop

FOLDER = "continued"
_SEQUENCES_AT_ONCE = 1024


def run(config: ml_collections.ConfigDict) -> Artifact:
    """Trains the base of `config.workdir` on with the settings `config.training`, and scores it.

    Raises:
      UserError: the base is not finished, or the config does not fit.
    """
    return train_on(config, settings_of(config), FOLDER, {}, "training")


def settings_of(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """`config.training` without the keys that only a memory has."""
    of_a_memory = ("mode", "alpha")
    return ml_collections.ConfigDict({key: value for key, value in config.training.items() if key not in of_a_memory})


def train_on(
    config: ml_collections.ConfigDict,
    settings: ml_collections.ConfigDict,
    name: str,
    inputs: dict[str, str],
    group: str,
) -> Artifact:
    """Trains the finished base on, from its best parameters, with a fresh optimizer and schedule.

    What is kept is the best on validation, the base itself included.

    Args:
      config: the whole config.
      settings: of the training on, a group of `configs.default.optimization`.
      name: folder of `config.workdir` that it goes to.
      inputs: fingerprints of artifacts that the settings follow from.
      group: the config's name for `settings`.

    Returns:
      An artifact of kind "base" whose summary also holds training_flops, and perplexity by held-out split.
    """
    workdir = epath.Path(config.workdir)
    sharding = Sharding.of(config)
    artifact = open_artifact(workdir / "base", "base")
    model = saved.language_model_config(artifact)
    kept, inputs = {"training": loop.origin(settings)}, {"base": artifact.fingerprint, **inputs}
    if finished := find_finished(workdir / name, "base", kept, inputs):
        say(f"{name}: finished already")
        return finished
    writer = ArtifactWriter.create(workdir / name, "base", kept, inputs, {})
    best, figures = base.train(
        config,
        settings,
        name,
        writer.path,
        model,
        initialise=lambda parameters: parameters,
        start=lambda: saved.load_language_model(artifact.path, sharding)[:1],
        group=group,
    )
    length = config.base.context_length
    per_step = 3 * flops.language_model_forward(model, length) * settings.batch_sequences * length
    figures["training_flops"] = float(per_step) * figures["steps"]
    tokens = open_artifact(workdir / "tokens", "tokens")

    def perplexities(parameters) -> dict[str, float]:
        return {
            split: _perplexity(parameters, model, TokenStream(tokens, split), length, sharding)
            for split in ("validation", "test")
        }

    figures["perplexity"] = perplexities(best)
    # Training on may only do harm to a model of a better text; then the base itself is what the same compute gives.
    before, _, _ = saved.load_language_model(artifact.path, sharding)
    start = perplexities(before)
    if start["validation"] <= figures["perplexity"]["validation"]:
        say(f"{name}: no step was better on validation than the base itself, which is kept")
        best, figures["step"], figures["perplexity"] = before, 0, start
    saved.seal(writer, model, best, figures)
    return open_artifact(workdir / name, "base")


def _perplexity(parameters, model, stream: TokenStream, length: int, sharding) -> float:
    """Over every whole sequence of a split."""
    count, scores = num_sequences(stream, length), []
    for first in range(0, count, _SEQUENCES_AT_ONCE):
        tokens_SxT, next_SxT, _ = read_sequences(stream, first, min(_SEQUENCES_AT_ONCE, count - first), length)
        scores_SxT = language_model_log_probabilities(parameters, model, tokens_SxT, next_SxT, sharding=sharding)
        scores.append(np.ravel(scores_SxT))
    return float(perplexity(np.concatenate(scores)))
