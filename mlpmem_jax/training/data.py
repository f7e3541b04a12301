"""The input pipeline: random access to sequences in TensorStore, shuffled, batched and prefetched by Grain."""

from __future__ import annotations

import grain
import jax
import numpy as np

from mlpmem_jax.core import host
from mlpmem_jax.core.artifacts import Artifact
from mlpmem_jax.corpus.tokens import TokenStream, num_sequences, read_sequences
from mlpmem_jax.retrieval.datastore import memory_inputs
from mlpmem_jax.retrieval.targets_artifact import TargetsReader, token_dtype

_FEWEST_READERS = 4  # threads; reads mostly wait
_READ_AHEAD = 8  # sequences per thread
_ENTRY_MULTIPLE = 8  # padded entries per position: a multiple of the widest vector register


class TokenSource:
    """Sequences for training the language model itself: tokens [T] and next tokens [T], int32."""

    def __init__(self, stream: TokenStream, length: int):
        self._stream, self._length = stream, length

    def __len__(self) -> int:
        return num_sequences(self._stream, self._length)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        tokens, following, _ = read_sequences(self._stream, int(index), 1, self._length)
        return {"tokens": tokens[0], "next_tokens": following[0]}


class TargetSource:
    """Sequences for training the memory.

    Each has `next_tokens` [T] int32, the sparse target distribution as `token_ids` [T, E] uint16 or int32 and
    `probabilities` [T, E] float16, as stored (padded with zeros; E = `entries`), and either `memory_inputs`
    [T, D] from the datastore (offline) or `tokens` [T] int32 for the base LM (online).
    """

    def __init__(self, datastore: Artifact, targets: Artifact, stream: TokenStream | None = None):
        self._datastore, self._targets, self._stream = datastore, TargetsReader(targets), stream
        self._length = datastore.arrays["next_tokens"].shape[1]
        self.entries = padded_entries(self._targets.max_entries)

    def __len__(self) -> int:
        return self._datastore.arrays["next_tokens"].shape[0]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        index = int(index)
        offsets_T1, token_ids_M, probabilities_M = self._targets.read(index, index + 1)
        filled_TxE = np.arange(self.entries) < np.diff(offsets_T1)[:, None]
        token_ids_TxE = np.zeros((self._length, self.entries), token_ids_M.dtype)
        probabilities_TxE = np.zeros((self._length, self.entries), probabilities_M.dtype)
        token_ids_TxE[filled_TxE] = token_ids_M
        probabilities_TxE[filled_TxE] = probabilities_M
        item = {"token_ids": token_ids_TxE, "probabilities": probabilities_TxE}
        if self._stream is None:
            item["memory_inputs"] = self._datastore.read(memory_inputs(self._datastore), index, index + 1)[0]
            item["next_tokens"] = self._datastore.read("next_tokens", index, index + 1)[0]
        else:
            tokens, following, _ = read_sequences(self._stream, index, 1, self._length)
            item.update(tokens=tokens[0], next_tokens=following[0])
        return item


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


def batches(source, batch_sequences: int, seed: int, part: int = 0, parts: int = 1) -> grain.DatasetIterator:
    """An endless, restorable iterator over one part of the rows of each global batch.

    The order depends only on the seed. Step n takes elements n * batch to (n + 1) * batch of one global order,
    regardless of the number of parts, so that a run may resume with a different number of processes. Each epoch is
    shuffled differently.

    Args:
      source: random-access sequences, trees of arrays.
      batch_sequences: sequences in one global batch.
      seed: random seed of the order.
      part, parts: which part of how many, from `core.sharding.Sharding.batch_part` of this process.
    """
    mine = grain.MapDataset.source(source).shuffle(seed=seed).repeat(None)[part::parts]
    readers = max(_FEWEST_READERS, host.cpu_count())
    options = grain.ReadOptions(num_threads=readers, prefetch_buffer_size=_READ_AHEAD * readers)
    return iter(mine.to_iter_dataset(options).batch(batch_sequences // parts, drop_remainder=True))
