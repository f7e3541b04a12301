"""The input pipeline: random access to sequences in TensorStore, shuffled, batched and prefetched by Grain."""

from __future__ import annotations

import grain
import jax
import numpy as np

from mlpmem_jax.core.artifacts import Artifact
from mlpmem_jax.corpus.tokens import TokenStream, num_sequences
from mlpmem_jax.retrieval.datastore import memory_inputs
from mlpmem_jax.retrieval.targets_artifact import TargetsReader, token_dtype

_READ_AHEAD_BYTES = 1 << 28
_READERS = 2, 16  # threads, which read one batch each; reads mostly wait
_ENTRY_MULTIPLE = 8  # padded entries per position: a multiple of the widest vector register


class TokenSource:
    """Sequences for training the language model itself: tokens [S, T] and next tokens [S, T], int32."""

    def __init__(self, stream: TokenStream, length: int):
        self._stream, self._length = stream, length

    def __len__(self) -> int:
        return num_sequences(self._stream, self._length)

    def __getitem__(self, sequences_S: np.ndarray) -> dict[str, np.ndarray]:
        tokens_SxT1 = self._stream.read_at(sequences_S * self._length, self._length + 1)
        return {"tokens": tokens_SxT1[:, :-1], "next_tokens": tokens_SxT1[:, 1:]}


class TargetSource:
    """Sequences for training the memory.

    They have `next_tokens` [S, T] int32, the sparse target distributions as `token_ids` [S, T, E] uint16 or int32 and
    `probabilities` [S, T, E] float16, as stored (padded with zeros; E = `entries`), and either `memory_inputs`
    [S, T, D] from the datastore (offline) or `tokens` [S, T] int32 for the base LM (online).
    """

    def __init__(self, datastore: Artifact, targets: Artifact, stream: TokenStream | None = None):
        self._datastore, self._targets = datastore, TargetsReader(targets)
        self._tokens = None if stream is None else TokenSource(stream, self._targets.length)
        self.entries = padded_entries(self._targets.max_entries)

    def __len__(self) -> int:
        return self._targets.num_sequences

    def __getitem__(self, sequences_S: np.ndarray) -> dict[str, np.ndarray]:
        counts_SxT, token_ids_M, probabilities_M = self._targets.read_sequences(sequences_S)
        is_filled_SxTxE = np.arange(self.entries) < counts_SxT[..., None]
        batch = {}
        for name, entries_M in (("token_ids", token_ids_M), ("probabilities", probabilities_M)):
            batch[name] = np.zeros(is_filled_SxTxE.shape, entries_M.dtype)
            batch[name][is_filled_SxTxE] = entries_M
        if self._tokens is not None:
            return batch | self._tokens[sequences_S]
        for name, stored in (("memory_inputs", memory_inputs(self._datastore)), ("next_tokens", "next_tokens")):
            batch[name] = self._datastore.read_rows(stored, sequences_S)
        return batch


def padded_entries(most: int) -> int:
    """Entries per position in a batch, if the largest position has `most` entries."""
    return -(-most // _ENTRY_MULTIPLE) * _ENTRY_MULTIPLE


def abstract_batch(sequences: int, length: int, entries: int, vocab_size: int, inputs: tuple[int, str] | None) -> dict:
    """Shapes and dtypes of a batch of `TargetSource`.

    Args:
      sequences, length: size of the batch.
      entries: entries per position, see `padded_entries`.
      vocab_size: determines the dtype of tokens.
      inputs: width and dtype of stored memory inputs; None for tokens instead.
    """
    shapes = {
        "token_ids": ((entries,), token_dtype(vocab_size)),
        "probabilities": ((entries,), "float16"),
        "next_tokens": ((), "int32"),
        "tokens" if inputs is None else "memory_inputs": ((), "int32") if inputs is None else (inputs[:1], inputs[1]),
    }
    return {name: jax.ShapeDtypeStruct((sequences, length, *shape), dtype) for name, (shape, dtype) in shapes.items()}


def read_ahead(bytes_of_batch: int) -> int:
    """Number of batches that are read ahead of the one in use, by one thread each; a batch is one process's part."""
    return int(np.clip(_READ_AHEAD_BYTES // bytes_of_batch, *_READERS))


def batches(source, batch_sequences: int, seed: int, part: int = 0, parts: int = 1) -> grain.DatasetIterator:
    """An endless, restorable iterator over one part of the rows of each global batch.

    The order depends only on the seed. Step n takes elements n * batch to (n + 1) * batch of one global order,
    regardless of the number of parts, so that a run may resume with a different number of processes. Each epoch is
    shuffled differently.

    Args:
      source: sequences; an array of their numbers [S] gives a dictionary of arrays [S, ...].
      batch_sequences: sequences in one global batch.
      seed: random seed of the order.
      part, parts: which part of how many, from `core.sharding.Sharding.batch_part` of this process.
    """
    count = batch_sequences // parts
    mine = grain.MapDataset.range(len(source)).shuffle(seed=seed).repeat(None)[part::parts]
    ahead = read_ahead(count * sum(array.nbytes for array in source[np.zeros(1, np.int64)].values()))
    options = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
    return iter(mine.batch(count, drop_remainder=True).map(source.__getitem__).to_iter_dataset(options))
