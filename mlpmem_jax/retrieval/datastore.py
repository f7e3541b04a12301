"""Stage `datastore`: one sharded forward pass turns every position of every split into a key and a memory input.

The key of position t is the input of the last block's feed-forward layer there; its value is the token after t
(section 3 of the paper). Held-out splits also store log p_LM(next token), so that later stages need not run the LM.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from mlpmem_jax.core.artifacts import ArraySpec, Artifact, ArtifactWriter, find_finished, open_artifact
from mlpmem_jax.core.config import plain_dict
from mlpmem_jax.core.errors import ConfigError, UserError
from mlpmem_jax.core.mesh import barrier
from mlpmem_jax.core.progress import progress, say
from mlpmem_jax.core.sharding import Sharding, local_rows
from mlpmem_jax.corpus.documents import SPLITS
from mlpmem_jax.corpus.tokens import TokenStream, num_sequences, read_sequences
from mlpmem_jax.models import language_model, saved
from mlpmem_jax.models.scoring import next_token_log_probabilities

_CHECKED_POSITIONS = 2**20  # of the base's scores


def block_at_depth(blocks: int, depth: float) -> int:
    """The block, counted from 1, at a relative depth; a depth of 0.7 of 36 blocks is the paper's block 25."""
    return max(1, round(depth * blocks))


@functools.partial(jax.jit, static_argnames=("config", "input_blocks", "dtype", "compute_dtype", "sharding", "scored"))
def forward(parameters, tokens_BxT, next_BxT, *, config, input_blocks, dtype, compute_dtype, sharding, scored):
    """The inputs of `input_blocks`, [B, T, D] of `dtype`, and log p_LM(next) if `scored`, else None.

    Both are sharded along the batch only, so that each process writes whole rows.
    """
    final, states = language_model.features(
        parameters,
        config,
        tokens_BxT,
        input_blocks=input_blocks,
        compute_dtype=compute_dtype,
        activations=sharding.activations,
    )
    rows = sharding.rows(3)
    outputs = [jax.lax.with_sharding_constraint(states[block].astype(dtype), rows) for block in input_blocks]
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


@dataclasses.dataclass(frozen=True)
class LoadedModels:
    """The base LM, and the key model: the same model, unless the config names another one.

    Attributes:
      sharding: sharding of both models.
      base, key_model: their parameters.
      base_config, key_config: their dimensions.
      fingerprints: fingerprints of their artifacts, by name.
      input_block: the block of the base, counted from 1, whose feed-forward input the memory reads.
      dtype: dtype of the stored arrays.
      compute_dtype: dtype of the forward pass.
    """

    sharding: Sharding
    base: dict
    base_config: language_model.Config
    key_model: dict
    key_config: language_model.Config
    fingerprints: dict[str, str]
    input_block: int
    dtype: jnp.dtype
    compute_dtype: jnp.dtype

    @classmethod
    def load(cls, config: ml_collections.ConfigDict) -> LoadedModels:
        """Loads the models of a workdir.

        Raises:
          ArtifactError: a model is missing or cannot be read.
          ConfigError: the models have different vocabularies.
        """
        workdir, sharding = epath.Path(config.workdir), Sharding.of(config)
        base, base_config, artifact = saved.load_language_model(workdir / "base", sharding)
        fingerprints = {"base": artifact.fingerprint}
        key_model, key_config = base, base_config
        if config.datastore.key_model:
            key_model, key_config, artifact = saved.load_language_model(workdir / "key_model", sharding)
            fingerprints["key_model"] = artifact.fingerprint
        if key_config.vocab_size != base_config.vocab_size:
            raise ConfigError(
                f"config.datastore.key_model: has a vocabulary of {key_config.vocab_size} but the base of "
                f"{base_config.vocab_size}; both must use the same tokenizer"
            )
        return cls(
            sharding=sharding,
            base=base,
            base_config=base_config,
            key_model=key_model,
            key_config=key_config,
            fingerprints=fingerprints,
            input_block=block_at_depth(base_config.blocks, config.datastore.input_depth),
            dtype=jnp.dtype(config.datastore.dtype),
            compute_dtype=jnp.dtype(config.datastore.compute_dtype),
        )

    @property
    def base_makes_keys(self) -> bool:
        return self.key_model is self.base

    @property
    def separate_inputs(self) -> bool:
        """Whether memory inputs are stored separately from the keys."""
        return not (self.base_makes_keys and self.input_block == self.key_config.blocks)

    def outputs(self, tokens_BxT: np.ndarray, next_BxT: np.ndarray, scored: bool) -> dict[str, np.ndarray]:
        """This process's rows of every array of the datastore that needs a model."""
        tokens, following = self.sharding.global_batch((tokens_BxT, next_BxT))
        run = functools.partial(forward, dtype=self.dtype, compute_dtype=self.compute_dtype, sharding=self.sharding)
        last, blocks = self.base_config.blocks, []
        if self.base_makes_keys:
            blocks.append(last)
        if self.separate_inputs:
            blocks.append(self.input_block)
        states, scores = run(
            self.base, tokens, following, config=self.base_config, input_blocks=tuple(blocks), scored=scored
        )
        rows = {"memory_inputs": local_rows(states[-1])} if self.separate_inputs else {}
        if not self.base_makes_keys:
            last = self.key_config.blocks
            states, _ = run(
                self.key_model, tokens, following, config=self.key_config, input_blocks=(last,), scored=False
            )
        rows["keys"] = local_rows(states[0])
        if scored:
            rows["base_log_probabilities"] = local_rows(scores)
        return rows


def _array_specs(
    models: LoadedModels, sequences: int, length: int, per_shard: int, scored: bool
) -> dict[str, ArraySpec]:
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


def _build_split(config: ml_collections.ConfigDict, tokens: Artifact, models: LoadedModels, split: str) -> Artifact:
    path = epath.Path(config.workdir) / "datastore" / split
    length, per_shard = config.base.context_length, config.datastore.sequences_per_shard
    inputs = {"tokens": tokens.fingerprint, **models.fingerprints}
    settings = {"context_length": length, **plain_dict(config.datastore)}
    del settings["batch_sequences"]  # the batch size does not change the result
    if finished := find_finished(path, "datastore", settings, inputs):
        say(f"datastore/{split}: already finished")
        return finished

    stream = TokenStream(tokens, split)
    sequences = num_sequences(stream, length)
    if sequences < 1:
        raise ConfigError(
            f"config.base.context_length: {length} is more than the {stream.length} tokens of the {split} split; "
            "lower it, or provide more text"
        )
    specs = _array_specs(models, sequences, length, per_shard, scored=split != "train")
    writer = ArtifactWriter.create(path, "datastore", settings, inputs, specs)
    sizes = {shard: min(per_shard, sequences - shard * per_shard) for shard in writer.incomplete_shards()}
    barrier(f"datastore {split} listed")
    with progress(length * sum(sizes.values()), f"datastore/{split}", "positions") as bar:
        _write_shards(config, models, stream, writer, sizes, split, bar)
    barrier(f"datastore {split} written")
    if jax.process_index() == 0:
        writer.seal(summary(sequences, length, models.key_config.width, models.input_block))
    barrier(f"datastore {split} sealed")
    artifact = open_artifact(path, "datastore")
    if split != "train":
        _note_bad_base(artifact, min(sequences, -(-_CHECKED_POSITIONS // length)), tokens.summary["vocab_size"], split)
    return artifact


def _note_bad_base(artifact: Artifact, sequences: int, vocab_size: int, split: str) -> None:
    """Warns if the base predicts the text worse than by guessing."""
    loss = -float(artifact.read("base_log_probabilities", 0, sequences).mean())
    if loss > math.log(vocab_size):
        say(
            f"warning: the base's loss on the {split} split, {loss:.2f} nats per token, is above the "
            f"{math.log(vocab_size):.2f} of guessing among the tokenizer's {vocab_size:,} tokens: the base is "
            "untrained, or its tokenizer is another one (config.tokenizer.path)"
        )


def _write_shards(
    config, models: LoadedModels, stream: TokenStream, writer: ArtifactWriter, sizes: dict[int, int], split: str, bar
) -> None:
    """Runs the forward passes of shards of `sizes` sequences, as many shards at once as the mesh has batch shards.

    A thread checks and writes a shard while the next one is computed.
    """
    length, per_shard = config.base.context_length, config.datastore.sequences_per_shard
    shards, part = list(sizes), models.sharding.batch_part
    largest = config.datastore.batch_sequences // part.count
    multiple = models.sharding.shards("batch") // part.count

    def finish(shard: int, outputs: list[dict], read: dict, writes: bool) -> None:
        for output in outputs:
            _check_finite(output, f"datastore/{split}, shard {shard}", config.datastore)
        if writes:
            arrays = {name: np.concatenate([output[name] for output in outputs])[: sizes[shard]] for name in outputs[0]}
            writer.write_shard(shard, {**arrays, **read})

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        finishing = None
        for first in range(0, len(shards), part.count):
            group = shards[first : first + part.count]
            # Every process runs every forward pass; those without a shard use a copy of another one.
            shard = group[min(part.index, len(group) - 1)]
            tokens_SxT, next_SxT, documents_SxT = read_sequences(stream, shard * per_shard, sizes[shard], length)
            longest = max(sizes[member] for member in group)
            rows, outputs = rows_of_pass(longest, largest, multiple), []
            for offset in range(0, longest, rows):
                outputs.append(models.outputs(*_padded(tokens_SxT, next_SxT, offset, rows), split != "train"))
                bar.advance(length * sum(min(max(sizes[member] - offset, 0), rows) for member in group))
            if finishing is not None:
                finishing.result()
            read, writes = {"next_tokens": next_SxT, "documents": documents_SxT}, part.index < len(group) and part.leads
            finishing = thread.submit(finish, shard, outputs, read, writes)
        if finishing is not None:
            finishing.result()


def summary(sequences: int, length: int, width: int, input_block: int) -> dict[str, int]:
    """The summary in the manifest of a datastore; `input_block` is the block whose input the memory reads."""
    return {"sequences": sequences, "positions": sequences * length, "width": width, "input_block": input_block}


def memory_inputs(datastore: Artifact) -> str:
    """The name of the array with the memory's inputs: they are stored separately only if they are not the keys."""
    return "memory_inputs" if "memory_inputs" in datastore.arrays else "keys"


def rows_of_pass(count: int, largest: int, multiple: int) -> int:
    """Rows per forward pass over `count` sequences, for few passes, little padding and a single compiled shape.

    Args:
      count: number of sequences, at least 1.
      largest: maximum rows per pass, a multiple of `multiple`.
      multiple: number of equal shards into which the devices split the rows.
    """
    passes = -(-count // largest)
    return -(-count // (passes * multiple)) * multiple


def _check_finite(arrays: dict[str, np.ndarray], where: str, settings: ml_collections.ConfigDict) -> None:
    """Raises UserError for the first array with an infinite or NaN value."""
    for name, array in arrays.items():
        if np.isfinite(array).all():
            continue
        if array.dtype == np.float16 and not np.isnan(array).any():
            cause = f"float16 overflows beyond {np.finfo(np.float16).max:,.0f}"
            remedy = "set config.datastore.dtype to bfloat16"
        else:
            cause = f"the forward pass ran in {settings.compute_dtype}"
            remedy = "set config.datastore.compute_dtype to float32"
            if settings.compute_dtype == "float32":
                remedy = "the model's parameters are unusable; import or train it again"
        raise UserError(f"{where}: {name} has values that are not finite ({cause}); {remedy}")


def _padded(tokens_SxT: np.ndarray, next_SxT: np.ndarray, offset: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows offset to offset + batch, padded past the end by repeating the first row."""
    rows = np.arange(offset, offset + batch)
    rows = np.where(rows < len(tokens_SxT), rows, 0)
    return tokens_SxT[rows], next_SxT[rows]


def run(config: ml_collections.ConfigDict) -> dict[str, Artifact]:
    """Builds the datastore of every split.

    Raises:
      UserError: an input is missing or contradicts the config.
    """
    tokens = open_artifact(epath.Path(config.workdir) / "tokens", "tokens")
    models = LoadedModels.load(config)
    shards = models.sharding.shards("batch")
    if config.datastore.batch_sequences % shards:
        raise ConfigError(
            f"config.datastore.batch_sequences: {config.datastore.batch_sequences} is not a multiple of the {shards} "
            "batch shards of the mesh"
        )
    return {split: _build_split(config, tokens, models, split) for split in SPLITS}
