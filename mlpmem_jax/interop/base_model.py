"""Stage `base`: the frozen language model, trained here, or imported from Hugging Face or a GGUF file."""

from __future__ import annotations

import ml_collections
from etils import epath

from mlpmem_jax.core.artifacts import Artifact, ArtifactWriter, find_finished, open_artifact
from mlpmem_jax.core.errors import ConfigError
from mlpmem_jax.core.progress import say
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.interop import gguf_model, huggingface, sources
from mlpmem_jax.models import language_model, saved
from mlpmem_jax.training import continued, train_base

PRETRAINED = "pretrained"
_MOST_PADDING = 1.25  # rows of a vocabulary per id of its tokenizer; published models have up to 1.03


def _imported(config: ml_collections.ConfigDict, source: str, folder: str, key: str, load) -> Artifact:
    """Imports a model, read by `load`, as an artifact of the working directory, and checks it against the tokenizer."""
    path = epath.Path(config.workdir) / folder
    tokens = open_artifact(epath.Path(config.workdir) / "tokens", "tokens")
    settings, inputs = {"path": source}, {"tokens": tokens.fingerprint, **sources.identity(source)}
    if finished := find_finished(path, "base", settings, inputs):
        say(f"{folder}: already finished")
        return finished
    sharding = Sharding.of(config)
    with sources.local(source) as (place, commit):
        parameters, model = load(place, sharding)
    check_fits(f"config.{key}={source}", model, tokens, config.base.context_length)
    writer = ArtifactWriter.create(path, "base", settings, inputs, {})
    return saved.seal(writer, model, parameters, {"commit": commit} if commit else {})


def run(config: ml_collections.ConfigDict) -> Artifact:
    """Trains or imports the base LM, and imports the key model if it is another model.

    The original of an imported base that is fine-tuned is kept in `pretrained`.

    Raises:
      UserError: the config, the tokens, and the model's folder or file do not match.
    """
    if config.datastore.key_model:
        load = huggingface.load_language_model
        _imported(config, config.datastore.key_model, "key_model", "datastore.key_model", load)
    if config.base.source == "train":
        return train_base.run(config)
    loaders = {"huggingface": huggingface.load_language_model, "gguf": gguf_model.load_language_model}
    folder = PRETRAINED if config.base.finetune_steps else "base"
    imported = _imported(config, config.base.path, folder, "base.path", loaders[config.base.source])
    return continued.finetune(config, folder) if config.base.finetune_steps else imported


def check_fits(source, model: language_model.Config, tokens: Artifact, context_length: int) -> None:
    """Checks that a language model can read the tokens in sequences of `context_length` positions.

    Raises:
      ConfigError: its vocabulary is smaller than the tokenizer's or much larger, or its context shorter; names
        `source`.
    """
    ids = tokens.summary["vocab_size"]
    if model.vocab_size < ids or model.vocab_size > _MOST_PADDING * ids:
        raise ConfigError(
            f"{source}: has a vocabulary of {model.vocab_size}, but the tokenizer has ids up to {ids - 1}; use the "
            "tokenizer that belongs to this model"
        )
    if model.context_length < context_length:
        raise ConfigError(
            f"config.base.context_length: {context_length} is longer than the {model.context_length} positions of "
            f"{source}"
        )
