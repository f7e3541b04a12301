"""The training text as passages, and retrievers over them.

A passage is a run of about the requested number of words from one document. Passages come from the training split only,
the text that the memory and the datastore were built from.
"""

from __future__ import annotations

import functools
import itertools
import logging
import pathlib
import re
from collections.abc import Mapping
from typing import Protocol

import numpy as np
from etils import epath
from jax.sharding import Mesh

from mlpmem_jax.comparison.searching import fingerprint, open_index, source_of
from mlpmem_jax.core.artifacts import Artifact
from mlpmem_jax.core.errors import ConfigError, UserError, require
from mlpmem_jax.core.progress import progress
from mlpmem_jax.corpus.tokens import TokenStream, read_tokenizer

_DOCUMENTS_AT_ONCE = 1024
_WORDS = re.compile(r"\S+\s*")


class Retriever(Protocol):
    """Finds passages for queries.

    Attributes:
      bytes: size of the passages and of their index.
    """

    bytes: int

    def retrieve(self, queries: list[str], count: int) -> list[list[str]]:
        """The `count` best passages of each query, best first."""


def documents(tokens: Artifact) -> list[str]:
    """The documents of the training split of a `tokens` artifact, decoded."""
    tokenizer, stream = read_tokenizer(tokens), TokenStream(tokens, "train")
    ends = stream.document_ends
    starts = np.concatenate([[0], ends[:-1]])
    texts: list[str] = []
    for first in range(0, len(ends), _DOCUMENTS_AT_ONCE):
        bounds = zip(starts[first : first + _DOCUMENTS_AT_ONCE], ends[first : first + _DOCUMENTS_AT_ONCE], strict=True)
        ids = [stream.read(int(start), int(end) - 1).tolist() for start, end in bounds]  # without the end of text
        texts += tokenizer.decode_batch(ids, skip_special_tokens=False)
    return texts


def split(text: str, words: int) -> list[str]:
    """Splits a document into passages of nearly equal length, at most `words` words each."""
    pieces = _WORDS.findall(text)
    count = -(-len(pieces) // words)
    bounds = np.linspace(0, len(pieces), count + 1).round().astype(int)
    return ["".join(pieces[low:high]).strip() for low, high in itertools.pairwise(bounds)]


class BM25:
    """Lucene's BM25 with k1 = 1.5 and b = 0.75, from the package bm25s (extra `rag`)."""

    def __init__(self, passages: list[str]):
        self._library = require("bm25s", extra="rag")
        logging.getLogger("bm25s").setLevel(logging.WARNING)
        self._passages, self._index = passages, self._library.BM25(k1=1.5, b=0.75)
        self._index.index(self._tokenized(passages), show_progress=False)
        arrays = (value for value in self._index.scores.values() if isinstance(value, np.ndarray))
        vocabulary = sum(len(word.encode()) for word in self._index.vocab_dict)
        self.bytes = _text_bytes(passages) + vocabulary + sum(array.nbytes for array in arrays)

    def _tokenized(self, texts: list[str]):
        return self._library.tokenize(texts, stopwords="en", show_progress=False)

    def retrieve(self, queries: list[str], count: int) -> list[list[str]]:
        count = min(count, len(self._passages))
        ids_QxK, _ = self._index.retrieve(self._tokenized(queries), k=count, show_progress=False)
        return [[self._passages[index] for index in ids_K] for ids_K in ids_QxK]


class Dense:
    """Search by inner product of unit-length sentence vectors from a sentence-transformers encoder (extra `dense`).

    Many passages are searched with the backend of config.targets: for unit-length vectors, the largest inner products
    are the smallest distances.
    """

    def __init__(self, passages: list[str], folder: str, settings: Mapping, mesh: Mesh, index_folder: epath.Path):
        library = require("sentence_transformers", extra="dense")
        try:
            self._encoder = library.SentenceTransformer(folder, device="cpu")
        except (OSError, ValueError) as error:
            raise UserError(f"config.comparison.retriever: {folder} holds no sentence encoder: {error}") from error
        self._passages, vectors_NxD = passages, self._encoded(passages, "passages")
        settings = {**settings, "search_dimensions": 0}  # those of keys
        kept = index_folder / f"passages_{fingerprint(vectors_NxD.tobytes(), settings)}"
        self._open = functools.partial(open_index, source_of(vectors_NxD), settings, mesh=mesh, folder=kept)
        self._index = None
        weights = sum(file.stat().st_size for file in pathlib.Path(folder).rglob("*") if file.is_file())
        self.bytes = _text_bytes(passages) + vectors_NxD.nbytes + weights

    def _encoded(self, texts: list[str], name: str) -> np.ndarray:
        parts = []
        with progress(len(texts), f"encoding {name}", "texts") as bar:
            for first in range(0, len(texts), _DOCUMENTS_AT_ONCE):
                part = texts[first : first + _DOCUMENTS_AT_ONCE]
                parts.append(self._encoder.encode(part, normalize_embeddings=True, show_progress_bar=False))
                bar.advance(len(part))
        return np.concatenate(parts)

    def retrieve(self, queries: list[str], count: int) -> list[list[str]]:
        count, queries_QxD = min(count, len(self._passages)), self._encoded(queries, "queries")
        self._index = self._index or self._open(k=count, queries_QxD=queries_QxD)
        _, best_QxK = self._index.search(queries_QxD, count)
        return [[self._passages[index] for index in ids_K] for ids_K in best_QxK]


def _text_bytes(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def check_retriever(name: str) -> None:
    """Checks that a retriever can be opened, before anything is trained or encoded.

    Raises:
      UserError: its package or its folder is missing.
    """
    if name == "bm25":
        require("bm25s", extra="rag")
        return
    require("sentence_transformers", extra="dense")
    if not pathlib.Path(name).is_dir():
        raise UserError(f"config.comparison.retriever: {name} holds no sentence encoder: it is no folder")


def open_retriever(
    name: str, tokens: Artifact, words: int, settings: Mapping, mesh: Mesh, index_folder: epath.Path
) -> Retriever:
    """Opens a retriever over the training passages.

    Args:
      name: "bm25", or the folder of a sentence encoder.
      tokens: the `tokens` artifact whose training split is searched.
      words: maximum words per passage.
      settings: config.targets, whose backend searches many vectors.
      mesh: the devices to search on.
      index_folder: where the index is stored.

    Raises:
      ConfigError: the corpus has no passages.
      UserError: a package or the encoder is missing.
    """
    passages = [passage for text in documents(tokens) for passage in split(text, words)]
    if not passages:
        raise ConfigError(f"{tokens.path}: its training split has no words, so there are no passages to retrieve")
    return make_retriever(name, passages, settings, mesh, index_folder)


def make_retriever(
    name: str, passages: list[str], settings: Mapping, mesh: Mesh, index_folder: epath.Path
) -> Retriever:
    """Opens a retriever over given passages; other arguments as in `open_retriever`."""
    return BM25(passages) if name == "bm25" else Dense(passages, name, settings, mesh, index_folder)
