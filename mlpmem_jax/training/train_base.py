"""Trains a language model on the tokens: stage `base`, and continued training of a finished one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from mlpmem_jax.core.artifacts import Artifact, ArtifactWriter, find_finished, open_artifact
from mlpmem_jax.core.config import plain_dict
from mlpmem_jax.core.progress import say
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.corpus.tokens import TokenStream, num_sequences, read_sequences
from mlpmem_jax.models import gpt2, language_model, saved
from mlpmem_jax.models.interpolation import perplexity
from mlpmem_jax.models.scoring import language_model_log_probabilities
from mlpmem_jax.training import data, loop
from mlpmem_jax.training.loss import sparse_cross_entropy


class Adapters(NamedTuple):
    """Adapters that are trained instead of a model's own parameters.

    Attributes:
      frozen: the model's own parameters.
      merge: (frozen, adapters) -> the parameters that the model uses.
      logical_axes: tree like the adapters whose leaves are tuples of logical axis names.
    """

    frozen: dict
    merge: Callable[[dict, dict], dict]
    logical_axes: dict


@dataclasses.dataclass(frozen=True)
class LanguageModelLoss:
    """Cross entropy of the next tokens.

    Attributes:
      model: the model's dimensions.
      settings: the optimization settings.
      merge: (frozen, trained) -> the parameters that the model uses.
    """

    model: language_model.Config
    settings: ml_collections.ConfigDict
    merge: Callable[[dict, dict], dict]

    def __call__(self, sharding: Sharding, parameters: dict, frozen: dict, batch: dict):
        """(loss, {name: statistic}), as in `loop.TrainingTask`."""
        parameters, dtype = self.merge(frozen, parameters), jnp.dtype(self.settings.compute_dtype)
        hidden_BxTxD, _ = language_model.features(
            parameters, self.model, batch["tokens"], compute_dtype=dtype, remat=self.settings.remat
        )
        hidden_NxD = hidden_BxTxD.reshape(-1, self.model.width).astype(dtype)
        no_entries = jnp.zeros((len(hidden_NxD), 0))
        loss, statistics = sparse_cross_entropy(
            hidden_NxD,
            language_model.output_kernel(parameters),
            no_entries.astype(jnp.int32),
            no_entries,
            batch["next_tokens"].reshape(-1),
            alpha=0.0,
            vocab_size=self.model.vocab_size,
            chunk=self.settings.loss_chunk,
            sharding=sharding,
        )
        return loss, {"cross_entropy": statistics["cross_entropy"]}


def train(
    config: ml_collections.ConfigDict,
    settings: ml_collections.ConfigDict,
    model: language_model.Config,
    initialize: Callable[..., dict],
    *,
    name: str,
    folder: str,
    group: str,
    start: Callable[[], tuple] = tuple,
    adapters: Adapters | None = None,
) -> tuple[dict, dict[str, float]]:
    """Trains a language model on the tokens of `config.workdir`.

    Args:
      config: the whole config.
      settings: the optimization settings.
      model: the model's dimensions.
      initialize, start: as in `loop.TrainingTask` and `loop.Run`.
      name: label for progress output.
      folder: folder for checkpoints and metrics.
      group: the config's name for `settings`.
      adapters: set if `initialize` creates adapters rather than the model's parameters.

    Returns:
      The parameters, or adapters, with the best validation perplexity, and their metrics.
    """
    sharding = Sharding.of(config)
    loop.check_batch(settings, sharding, group)
    tokens = open_artifact(epath.Path(config.workdir) / "tokens", "tokens")
    length = config.base.context_length
    held_out = TokenStream(tokens, "validation")
    available = num_sequences(held_out, length)
    count = min(available, settings.evaluation_sequences or available)
    validation_tokens, validation_next, _ = read_sequences(held_out, 0, count, length)

    def own_parameters(frozen, parameters):
        return parameters

    frozen, merge, logical_axes = adapters or Adapters({}, own_parameters, language_model.logical_axes(model))
    merged = jax.jit(merge)

    def validate(parameters) -> dict[str, float]:
        scores = language_model_log_probabilities(
            merged(frozen, parameters), model, validation_tokens, validation_next, sharding=sharding
        )
        return {"perplexity": float(perplexity(np.ravel(scores)))}

    task = loop.TrainingTask(
        settings=settings,
        initialize=initialize,
        abstract_parameters=jax.eval_shape(initialize) if adapters else language_model.abstract_parameters(model),
        logical_axes=logical_axes,
        loss=LanguageModelLoss(model, settings, merge),
        positions_per_sequence=length,
        flops_per_position=3 * language_model.forward_flops(model, length),
    )
    source = data.TokenSource(TokenStream(tokens, "train"), length)
    return loop.fit(task, loop.Run(name, folder, source, validate, frozen, start), sharding)


def dimensions(config: ml_collections.ConfigDict, vocab_size: int) -> gpt2.GPT2Config:
    """The dimensions of a base LM that is trained from scratch."""
    return gpt2.GPT2Config(
        vocab_size=vocab_size,
        context_length=config.base.context_length,
        width=config.base.width,
        blocks=config.base.blocks,
        heads=config.base.heads,
    )


def run(config: ml_collections.ConfigDict) -> Artifact:
    """Trains the base LM from scratch.

    Raises:
      UserError: the config does not match the tokens.
    """
    path = epath.Path(config.workdir) / "base"
    tokens = open_artifact(epath.Path(config.workdir) / "tokens", "tokens")
    settings = {**plain_dict(config.base), "training": loop.origin(config.base.training)}
    inputs = {"tokens": tokens.fingerprint}
    if finished := find_finished(path, "base", settings, inputs):
        say("base: already finished")
        return finished
    model = dimensions(config, tokens.summary["vocab_size"])
    writer = ArtifactWriter.create(path, "base", settings, inputs, {})
    initialize = functools.partial(gpt2.init, model, jax.random.key(config.base.training.seed))
    parameters, summary = train(
        config, config.base.training, model, initialize, name="base", folder=writer.path, group="base.training"
    )
    return saved.seal(writer, model, parameters, summary)
