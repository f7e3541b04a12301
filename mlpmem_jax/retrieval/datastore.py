"""Stage `datastore`: one sharded forward pass turns every position of every split into a key and a memory input.

The key of position t is the input of the last block's feed-forward layer there; its value is the token after t
(PAPER, "The method", 1). Held-out splits also keep log p_LM(next token), so that later stages need not run the LM.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from mlpmem_jax.core import config as configs
from mlpmem_jax.core.artifacts import ArraySpec, Artifact, ArtifactWriter, find_finished, open_artifact
from mlpmem_jax.core.errors import ConfigError, UserError
from mlpmem_jax.core.mesh import barrier
from mlpmem_jax.core.progress import progress, say
from mlpmem_jax.core.sharding import Sharding, local_rows
from mlpmem_jax.corpus.tokens import TokenStream, num_sequences, read_sequences
from mlpmem_jax.models import language_model, saved
from mlpmem_jax.models.scoring import next_token_log_probabilities

SPLITS = ("train", "validation", "test")


def tapped_block(blocks: int, depth: float) -> int:
    """The block, counted from 1, at a relative depth; 0.7 of 36 is block 25, the paper's."""
    return max(1, round(depth * blocks))


@functools.partial(jax.jit, static_argnames=("config", "taps", "dtype", "compute_dtype", "sharding", "scored"))
def forward(parameters, tokens_BxT, next_BxT, *, config, taps, dtype, compute_dtype, sharding, scored):
    """Hidden states at the taps, [B, T, D] of `dtype`, and log p_LM(next) where `scored`, else None.

    Both are sharded along the batch alone, so that each process writes whole rows.
    """
    activations = sharding.named("batch", None, None)
    final, tapped = language_model.features(
        parameters, config, tokens_BxT, taps=taps, compute_dtype=compute_dtype, activations=activations
    )
    outputs = [jax.lax.with_sharding_constraint(tapped[tap].astype(dtype), activations) for tap in taps]
    if not scored:
        return outputs, None
    log_probabilities = next_token_log_probabilities(
        final,
        language_model.output_kernel(parameters),
        next_BxT,
        vocab_size=config.vocab_size,
        compute_dtype=compute_dtype,
        logits_sharding=sharding.named("batch", None, "vocab"),
    )
    return outputs, jax.lax.with_sharding_constraint(log_probabilities, sharding.named("batch"))


class _Models:
    """The base LM, and the model that makes the keys where that is another one."""

    def __init__(self, config: ml_collections.ConfigDict):
        self.sharding = Sharding.of(config)
        self.base, self.base_config, base_artifact = saved.load_language_model(
            epath.Path(config.workdir) / "base", self.sharding
        )
        self.fingerprints = {"base": base_artifact.fingerprint}
        self.dtype = jnp.dtype(config.datastore.dtype)
        self.compute_dtype = jnp.dtype(config.datastore.compute_dtype)
        self.input_tap = tapped_block(self.base_config.blocks, config.datastore.input_depth)
        self.key_model, self.key_config = self.base, self.base_config
        if config.datastore.key_model:
            self.key_model, self.key_config, artifact = saved.load_language_model(
                epath.Path(config.workdir) / "key_model", self.sharding
            )
            self.fingerprints["key_model"] = artifact.fingerprint
            if self.key_config.vocab_size != self.base_config.vocab_size:
                raise ConfigError(
                    f"config.datastore.key_model: has a vocabulary of {self.key_config.vocab_size}, the base of "
                    f"{self.base_config.vocab_size}; both must use the same tokenizer"
                )
        self.separate_inputs = bool(config.datastore.key_model) or self.input_tap != self.key_config.blocks

    def outputs(self, tokens_BxT: np.ndarray, next_BxT: np.ndarray, scored: bool) -> dict[str, np.ndarray]:
        """This process's rows of every array of the datastore that needs a model."""
        tokens, following = self.sharding.global_batch((tokens_BxT, next_BxT))
        run = functools.partial(
            forward,
            dtype=self.dtype,
            compute_dtype=self.compute_dtype,
            sharding=self.sharding,
        )
        base_taps = (self.input_tap,) if self.separate_inputs else (self.base_config.blocks,)
        if self.separate_inputs and self.key_model is self.base:
            base_taps = (self.base_config.blocks, self.input_tap)
        tapped, scores = run(self.base, tokens, following, config=self.base_config, taps=base_taps, scored=scored)
        rows = {}
        if self.separate_inputs:
            rows["memory_inputs"] = local_rows(tapped[-1])
        if self.key_model is not self.base:
            tapped, _ = run(
                self.key_model,
                tokens,
                following,
                config=self.key_config,
                taps=(self.key_config.blocks,),
                scored=False,
            )
        rows["keys"] = local_rows(tapped[0])
        if scored:
            rows["base_log_probabilities"] = local_rows(scores)
        return rows


def _array_specs(models: _Models, sequences: int, length: int, per_shard: int, scored: bool) -> dict[str, ArraySpec]:
    dtype = models.dtype.name

    def spec(dtype: str, *width: int) -> ArraySpec:
        return ArraySpec((sequences, length, *width), dtype, per_shard, (1, length, *width))

    specs = {
        "keys": spec(dtype, models.key_config.width),
        "next_tokens": spec("int32"),
        "documents": spec("int32"),
    }
    if models.separate_inputs:
        specs["memory_inputs"] = spec(dtype, models.base_config.width)
    if scored:
        specs["base_log_probabilities"] = spec("float32")
    return specs


def _build_split(config: ml_collections.ConfigDict, tokens: Artifact, models: _Models, split: str) -> Artifact:
    path = epath.Path(config.workdir) / "datastore" / split
    length, per_shard = config.base.context_length, config.datastore.sequences_per_shard
    inputs = {"tokens": tokens.fingerprint, **models.fingerprints}
    settings = {"context_length": length, **configs.plain(config.datastore)}
    del settings["batch_sequences"]  # how many go at once changes nothing
    if finished := find_finished(path, "datastore", settings, inputs):
        say(f"datastore/{split}: finished already")
        return finished

    stream = TokenStream(tokens, split)
    sequences = num_sequences(stream, length)
    if sequences < 1:
        raise ConfigError(
            f"config.base.context_length: {length} is more than the {stream.length} tokens of the {split} split; "
            "lower it or give more text"
        )
    scored = split != "train"
    writer = ArtifactWriter.create(
        path, "datastore", settings, inputs, _array_specs(models, sequences, length, per_shard, scored)
    )
    shards, part = writer.incomplete_shards(), models.sharding.batch_part
    barrier(f"datastore {split} listed")
    largest = config.datastore.batch_sequences // part.count
    multiple = models.sharding.shards("batch") // part.count
    left = {shard: min(per_shard, sequences - shard * per_shard) for shard in shards}
    with progress(sum(left.values()) * length, f"datastore/{split}", "positions") as bar:
        for first in range(0, len(shards), part.count):
            group = shards[first : first + part.count]
            # Every process runs every forward pass, those without a shard of their own on a copy of another.
            shard = group[min(part.index, len(group) - 1)]
            tokens_SxT, next_SxT, documents_SxT = read_sequences(stream, shard * per_shard, left[shard], length)
            longest = max(left[member] for member in group)
            rows, outputs = rows_of_pass(longest, largest, multiple), []
            for offset in range(0, longest, rows):
                outputs.append(models.outputs(*_padded(tokens_SxT, next_SxT, offset, rows), scored))
                _check_finite(outputs[-1], f"datastore/{split}, shard {shard}", config.datastore)
                bar.advance(length * sum(min(max(left[member] - offset, 0), rows) for member in group))
            if part.index < len(group) and part.leads:
                arrays = {
                    name: np.concatenate([output[name] for output in outputs])[: left[shard]] for name in outputs[0]
                }
                writer.write_shard(shard, {**arrays, "next_tokens": next_SxT, "documents": documents_SxT})
    barrier(f"datastore {split} written")
    if jax.process_index() == 0:
        writer.seal(summary(sequences, length, models.key_config.width, models.input_tap))
    barrier(f"datastore {split} sealed")
    return open_artifact(path, "datastore")


def summary(sequences: int, length: int, width: int, input_block: int) -> dict[str, int]:
    """What the manifest of a datastore says beside its arrays; `input_block` is the one that the memory reads."""
    return {"sequences": sequences, "positions": sequences * length, "width": width, "input_block": input_block}


def rows_of_pass(count: int, largest: int, multiple: int) -> int:
    """Rows of each forward pass over `count` sequences: few passes, little padding, and one shape to compile.

    Args:
      count: sequences, at least 1.
      largest: most rows of one pass, a multiple of `multiple`.
      multiple: into so many equal parts the devices divide the rows.
    """
    passes = -(-count // largest)
    return -(-count // (passes * multiple)) * multiple


def _check_finite(arrays: dict[str, np.ndarray], where: str, settings: ml_collections.ConfigDict) -> None:
    """Raises UserError at the first array with a number that is infinite or not a number."""
    for name, array in arrays.items():
        if np.isfinite(array).all():
            continue
        if array.dtype == np.float16 and not np.isnan(array).any():
            cause = f"float16 ends at {np.finfo(np.float16).max:,.0f}"
            remedy = "set config.datastore.dtype to bfloat16"
        else:
            cause = f"the forward pass ran in {settings.compute_dtype}"
            remedy = "set config.datastore.compute_dtype to float32"
            if settings.compute_dtype == "float32":
                remedy = "the model's parameters are not fit for use; import or train it again"
        raise UserError(f"{where}: {name} has numbers that are not finite ({cause}); {remedy}")


def _padded(tokens_SxT: np.ndarray, next_SxT: np.ndarray, offset: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows offset to offset + batch; past the end the first row is repeated."""
    rows = np.arange(offset, offset + batch)
    rows = np.where(rows < len(tokens_SxT), rows, 0)
    return tokens_SxT[rows], next_SxT[rows]


def run(config: ml_collections.ConfigDict) -> dict[str, Artifact]:
    """Builds the datastore of every split.

    Raises:
      UserError: an input is missing or contradicts the config.
    """
    tokens = open_artifact(epath.Path(config.workdir) / "tokens", "tokens")
    models = _Models(config)
    shards = models.sharding.shards("batch")
    if config.datastore.batch_sequences % shards:
        raise ConfigError(
            f"config.datastore.batch_sequences: {config.datastore.batch_sequences} is not divided by the {shards} "
            "batch shards of the mesh"
        )
    return {split: _build_split(config, tokens, models, split) for split in SPLITS}
