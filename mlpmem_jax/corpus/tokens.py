"""The stage `tokens`: converts a corpus to three streams of token ids; and the readers of those streams."""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence

import jax
import ml_collections
import numpy as np
import tokenizers
from etils import epath

from mlpmem_jax.core import mesh
from mlpmem_jax.core.artifacts import ArraySpec, Artifact, ArtifactWriter, find_finished, open_artifact
from mlpmem_jax.core.config import plain_dict
from mlpmem_jax.core.errors import UserError
from mlpmem_jax.core.progress import progress, say
from mlpmem_jax.corpus import documents, files, hub, installed_docs, overlap, tokenizer
from mlpmem_jax.corpus.documents import SPLITS

KIND = "tokens"
TOKENIZER_FILE = "tokenizer.json"
_READ_CHUNK = 4096  # tokens per range read
_BATCH_BYTES = 2**20  # text encoded together
_TRAINING_BYTES = 64 * 2**20  # text on which a tokenizer is trained
_WORD_CHARACTERS = 256  # longer words are split for training a tokenizer
_LONG_WORD = re.compile(rf"\S{{{_WORD_CHARACTERS}}}|\s{{{_WORD_CHARACTERS}}}")
_OVERLAP_BYTES = {"train": 2**30, "validation": 2**22, "test": 2**22}  # maximum text for comparing splits
_CHECKED_TOKENS = 2**20
_MUCH_UNKNOWN = 0.01  # share of unknown tokens


def open_source(corpus: ml_collections.ConfigDict) -> documents.Source:
    """The corpus that the group `corpus` of the config names.

    Raises:
      UserError: it does not exist, or needs an extra.
    """
    if corpus.source == "files":
        return files.open_source(corpus)
    if corpus.source == "hub":
        return hub.open_source(corpus)
    return installed_docs.open_source(corpus.packages)


def run(config: ml_collections.ConfigDict) -> Artifact:
    """Builds the artifact `tokens` in the workdir, or resumes it, or opens it if it is finished.

    Raises:
      UserError: the corpus or the tokenizer cannot be used; says which and why.
    """
    path = str(epath.Path(config.workdir) / KIND)
    made_by = {"corpus": plain_dict(config.corpus), "tokenizer": plain_dict(config.tokenizer)}
    source = open_source(config.corpus)
    inputs, loaded, end_of_text = dict(source.inputs), None, tokenizer.END_OF_TEXT
    if config.tokenizer.source != "train":
        loaded, end_of_text = tokenizer.load(config.tokenizer)
        inputs["tokenizer"] = hashlib.sha256(f"{loaded.to_str()}{end_of_text}".encode()).hexdigest()
    artifact = find_finished(path, KIND, made_by, inputs)
    if artifact is None:
        artifact = _build(path, config, made_by, inputs, source, loaded, end_of_text)
    else:
        say(f"{path}: already finished")
    lengths = {split: TokenStream(artifact, split).length for split in SPLITS}
    say("tokens: " + ", ".join(f"{split} {length:,}" for split, length in lengths.items()))
    _note_unknown(artifact)
    for split, length in lengths.items():
        if length <= config.base.context_length:
            raise UserError(
                f"{path}: the {split} split has {length} tokens, expected more than config.base.context_length, "
                f"{config.base.context_length}; provide more text, a larger fraction, or a shorter context"
            )
    return artifact


def _note_unknown(artifact: Artifact) -> None:
    """Warns if the tokenizer does not know the text: unknown tokens are easy to predict, and say nothing."""
    if (unknown := tokenizer.unknown_token(read_tokenizer(artifact))) is None:
        return
    stream = TokenStream(artifact, "validation")
    share = np.mean(stream.read(0, min(stream.length, _CHECKED_TOKENS)) == unknown[1])
    if share > _MUCH_UNKNOWN:
        say(
            f"warning: {share:.0%} of the tokens of the validation split are {unknown[0]!r}, which stands for all text "
            "that the tokenizer does not know; perplexities on them mean nothing: use a tokenizer made for this text"
        )


def _build(
    path: str,
    config: ml_collections.ConfigDict,
    made_by: dict,
    inputs: dict[str, str],
    source: documents.Source,
    loaded: tokenizers.Tokenizer | None,
    end_of_text: str,
) -> Artifact:
    is_first = jax.process_index() == 0
    parts = source.parts()
    partition = documents.make_partition(parts, config.corpus)
    for note in (*source.notes, *partition.notes):
        say(note)
    size = config.tokenizer.vocab_size if loaded is None else tokenizer.vocab_size(loaded, end_of_text)
    growth, before = (1, 0) if loaded is None else (tokenizer.growth(loaded), len(tokenizer.begin_ids(loaded)))
    arrays = _arrays(partition, size, growth, before + 2)
    create = functools.partial(ArtifactWriter.create, path, KIND, made_by, inputs, arrays)
    if is_first:
        writer = create()
        if not (epath.Path(path) / TOKENIZER_FILE).exists():
            trained = loaded or _train_tokenizer(parts, partition, config.tokenizer.vocab_size)
            writer.write_file(TOKENIZER_FILE, trained.to_str().encode())
    mesh.barrier("tokenizer written")
    writer = create()
    encoder = tokenizer.from_bytes((epath.Path(path) / TOKENIZER_FILE).read_bytes(), f"{path}/{TOKENIZER_FILE}")
    incomplete = writer.incomplete_shards()
    mesh.barrier("incomplete shards listed")
    end_id = encoder.token_to_id(end_of_text)
    mine = incomplete[jax.process_index() :: jax.process_count()]
    _write_shards(writer, parts, partition, functools.partial(_encode, encoder, end_id), mine)
    mesh.barrier("token shards written")
    if is_first:
        summary = _summary(partition, encoder, end_of_text) | {
            "overlap": _overlap(parts, partition),
            "revisions": {part.data_set: part.revision for part in parts if part.revision},
        }
        if open_source(config.corpus).inputs != source.inputs:  # still being copied, for example
            raise UserError(f"config.corpus: was changed while it was read; delete {path} and run again")
        writer.seal(summary, files=(TOKENIZER_FILE,))
    mesh.barrier("tokens sealed")
    return open_artifact(path, KIND)


def _arrays(partition: documents.Partition, vocab_size: int, growth: int, framing: int) -> dict[str, ArraySpec]:
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    arrays = {}
    for index, split in enumerate(SPLITS):
        capacity = partition.capacity(index, growth, framing)
        arrays[split] = ArraySpec((partition.num_shards, capacity), dtype, 1, (1, _READ_CHUNK))
        shape = (partition.num_shards, partition.capacity(index))
        arrays[f"{split}_lengths"] = ArraySpec(shape, "uint32", 1, (1, _READ_CHUNK))
        arrays[f"{split}_groups"] = ArraySpec(shape, "uint32", 1, (1, _READ_CHUNK))
    return arrays


def _train_tokenizer(parts, partition: documents.Partition, vocab_size: int) -> tokenizers.Tokenizer:
    sample = partition.sample(SPLITS.index("train"), _TRAINING_BYTES)
    say(f"training a tokenizer of {vocab_size:,} tokens on {partition.bytes_N[sample].sum() / 1e6:.1f} MB")
    texts = (text for _, text in documents.read_selected(parts, partition, sample))
    return tokenizer.train(itertools.chain.from_iterable(map(_shortened_words, texts)), vocab_size)


def _shortened_words(text: str) -> Iterator[str]:
    """The text, split wherever it has words (or gaps) longer than `_WORD_CHARACTERS`.

    Training time grows with the square of a word's length: half a megabyte of base pairs would never finish.
    """
    start = 0
    for match in _LONG_WORD.finditer(text):
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]


def _write_shards(writer: ArtifactWriter, parts, partition: documents.Partition, encode, shards: list[int]) -> None:
    selected = np.isin(partition.shard_N, shards) & (partition.split_N >= 0)
    total = partition.bytes_N[selected].sum()
    with progress(total / 1e6, "tokens", "MB") as bar:
        shard, ids, indices = None, [], []
        for batch in _batches(documents.read_selected(parts, partition, selected), partition):
            if shard is not None and partition.shard_N[batch[0][0]] != shard:
                writer.write_shard(shard, _shard_arrays(ids, indices, partition))
                ids, indices = [], []
            shard = int(partition.shard_N[batch[0][0]])
            ids += encode([text for _, text in batch])
            indices += [index for index, _ in batch]
            bar.advance(sum(partition.bytes_N[index] for index, _ in batch) / 1e6)
        if shard is not None:
            writer.write_shard(shard, _shard_arrays(ids, indices, partition))


def _overlap(parts, partition: documents.Partition) -> dict[str, dict[str, float]]:
    """The shares of held-out words that occur verbatim in the training split, by split and length of the run."""
    texts = {
        split: (
            text
            for _, text in documents.read_selected(parts, partition, partition.sample(index, _OVERLAP_BYTES[split]))
        )
        for index, split in enumerate(SPLITS)
    }
    shares = overlap.measure(texts.pop("train"), texts)
    say(
        "overlap, words inside runs of 13 (25) words that also occur in the training split: "
        + ", ".join(f"{split} {share['13']:.2%} ({share['25']:.2%})" for split, share in shares.items())
    )
    if max(share["13"] for share in shares.values()) > overlap.MUCH:
        say(
            f"warning: more than {overlap.MUCH:.0%} of a held-out split repeats training text, so metrics on it "
            "partly measure copying: group related text (config.corpus.group_key), or remove repeated text"
        )
    return shares


def _batches(selected: Iterator[tuple[int, str]], partition: documents.Partition) -> Iterator[list[tuple[int, str]]]:
    """Runs of documents of one shard, about `_BATCH_BYTES` each."""
    batch, size = [], 0
    for index, text in selected:
        if batch and (size >= _BATCH_BYTES or partition.shard_N[index] != partition.shard_N[batch[0][0]]):
            yield batch
            batch, size = [], 0
        batch.append((index, text))
        size += partition.bytes_N[index]
    if batch:
        yield batch


def _encode(encoder: tokenizers.Tokenizer, end_id: int, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each text, including the tokens that the tokenizer puts before a text, and the end of text."""
    begin = np.array(tokenizer.begin_ids(encoder), np.int64)
    return [np.concatenate([begin, ids, [end_id]]) for ids in tokenizer.encode(encoder, texts)]


def _shard_arrays(ids: list[np.ndarray], indices: list[int], partition: documents.Partition) -> dict[str, np.ndarray]:
    """The arrays of one shard from the token ids of its documents and their indices in the partition."""
    indices_N = np.array(indices)
    splits_N = partition.split_N[indices_N]
    arrays = {}
    for index, split in enumerate(SPLITS):
        chosen = np.flatnonzero(splits_N == index)
        arrays[split] = np.concatenate([np.empty(0, np.int64), *(ids[document] for document in chosen)])[None]
        arrays[f"{split}_lengths"] = np.array([[len(ids[document]) for document in chosen]], np.int64)
        arrays[f"{split}_groups"] = partition.group_N[indices_N[chosen]][None]
    return arrays


def _summary(partition: documents.Partition, encoder: tokenizers.Tokenizer, end_of_text: str) -> dict:
    return {
        "vocab_size": tokenizer.vocab_size(encoder, end_of_text),
        "end_of_text_id": encoder.token_to_id(end_of_text),
        "documents": {split: int((partition.split_N == index).sum()) for index, split in enumerate(SPLITS)},
        "bytes": {
            split: int(partition.bytes_N[partition.split_N == index].sum()) for index, split in enumerate(SPLITS)
        },
    }


def read_tokenizer(artifact: Artifact) -> tokenizers.Tokenizer:
    """The tokenizer of a `tokens` artifact."""
    return tokenizer.from_bytes(artifact.read_file(TOKENIZER_FILE), f"{artifact.path}/{TOKENIZER_FILE}")


def encode_prompts(artifact: Artifact, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompts, encoded like beginnings of documents in a `tokens` artifact.

    If the tokenizer puts no token before a document, an empty text becomes the end of text, which precedes a document.
    """
    encoder = read_tokenizer(artifact)
    begin, end = tokenizer.begin_ids(encoder), artifact.summary["end_of_text_id"]
    return [[*begin, *ids.tolist()] or [end] for ids in tokenizer.encode(encoder, texts)]


class TokenStream:
    """One split of a `tokens` artifact as a single stream: its documents in order, each followed by an end of text
    and preceded by the tokens that its tokenizer puts before a text.
    """

    def __init__(self, artifact: Artifact, split: str):
        self._artifact, self._split = artifact, split
        shards = range(artifact.num_shards)
        self._shard_ends = np.cumsum([artifact.shard_length(split, shard) for shard in shards], dtype=np.int64)

    @property
    def length(self) -> int:
        """Number of tokens."""
        return int(self._shard_ends[-1])

    def _read_all(self, name: str) -> np.ndarray:
        return np.concatenate([self._artifact.read_ragged(name, shard) for shard in range(self._artifact.num_shards)])

    @functools.cached_property
    def document_ends(self) -> np.ndarray:
        """int64 [documents]: position in the stream where each document ends, including its end of text."""
        return np.cumsum(self._read_all(f"{self._split}_lengths"), dtype=np.int64)

    @functools.cached_property
    def _groups(self) -> np.ndarray:
        """int32 [documents]: number of the group of each document."""
        name = f"{self._split}_groups"
        if name not in self._artifact.arrays:  # written before groups existed
            return np.arange(len(self.document_ends), dtype=np.int32)
        return self._read_all(name).astype(np.int32)

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.length:
            raise ValueError(f"tokens {start} to {stop} are not within a stream of {self.length}")

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop, int32 [stop - start]."""
        self._check_range(start, stop)
        return self.read_at(np.array([start]), stop - start)[0]

    def read_at(self, starts_S: np.ndarray, count: int) -> np.ndarray:
        """The `count` tokens from each start, int32 [S, count], all read at the same time."""
        tokens_M = np.empty(len(starts_S) * count, np.int32)
        ranges, places = [], []
        for row, start in enumerate(starts_S.tolist()):
            done = 0
            while done < count:
                shard = int(np.searchsorted(self._shard_ends, start + done, side="right"))
                begin = int(self._shard_ends[shard - 1]) if shard else 0
                stop = min(start + count, int(self._shard_ends[shard]))
                ranges.append((shard, start + done - begin, stop - begin))
                places.append(slice(row * count + done, row * count + stop - start))
                done = stop - start
        for place, tokens in zip(places, self._artifact.read_ranges(self._split, ranges), strict=True):
            tokens_M[place] = tokens
        return tokens_M.reshape(len(starts_S), count)

    def document_ids(self, start: int, stop: int) -> np.ndarray:
        """The text of the split to which each of the tokens start to stop belongs, int32 [stop - start], nondecreasing.

        All parts of one file, article or group count as one text.
        """
        self._check_range(start, stop)
        return self._groups[np.searchsorted(self.document_ends, np.arange(start, stop), side="right")]


def num_sequences(stream: TokenStream, context_length: int) -> int:
    """Number of whole sequences of a stream, each with the token that follows it; the rest is dropped."""
    return max(stream.length - 1, 0) // context_length


def read_sequences(
    stream: TokenStream, first: int, count: int, context_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Consecutive sequences of S = count and T = context_length; each token is a target once (stride = block).

    Returns:
      inputs_SxT, next_tokens_SxT (the token after each input) and documents_SxT (the document of each input), int32.

    Raises:
      ValueError: the stream does not have these sequences.
    """
    start, stop = first * context_length, (first + count) * context_length
    tokens = stream.read(start, stop + 1)
    shape = (count, context_length)
    return tokens[:-1].reshape(shape), tokens[1:].reshape(shape), stream.document_ids(start, stop).reshape(shape)
