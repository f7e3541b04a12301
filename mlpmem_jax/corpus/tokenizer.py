"""Tokenizers of the `tokenizers` library: trained here, from a file, or by Hugging Face name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import ml_collections
import numpy as np
import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, trainers

from mlpmem_jax.core.errors import UserError, require
from mlpmem_jax.corpus import gguf_tokenizer

END_OF_TEXT = "<|endoftext|>"
# Names of the same thing in other families of tokenizers.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]")


def train(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE, as GPT-2's: no text is out of its reach, and decoding gives the text back unchanged.

    The same texts in the same order give the same tokenizer, whatever the number of threads.

    Args:
      texts: documents; read once.
      vocab_size: tokens, 256 bytes and the end of text included; fewer where the texts do not give as many.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load(config: ml_collections.ConfigDict) -> tokenizers.Tokenizer:
    """The tokenizer of a file or a Hugging Face name.

    Args:
      config: the group `tokenizer`, with source "file" (a tokenizer.json or its folder), "gguf" or "hub".

    Raises:
      UserError: it cannot be had, or it lacks an end-of-text token.
    """
    if config.source == "file":
        file = epath.Path(config.path).expanduser()
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.exists():
            raise UserError(f"config.tokenizer.path: {file} does not exist; expected a tokenizer.json or its folder")
        return from_bytes(file.read_bytes(), str(file))
    if config.source == "gguf":
        return from_bytes(gguf_tokenizer.load(config.path).to_str().encode(), config.path)
    require("huggingface_hub", extra="hub")
    try:
        tokenizer = tokenizers.Tokenizer.from_pretrained(config.path)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"config.tokenizer.path: {config.path!r} could not be loaded: {error}") from error
    return from_bytes(tokenizer.to_str().encode(), config.path)


def from_bytes(content: bytes, name: str) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json's content, ready for `encode`.

    Raises:
      UserError: the content is not a tokenizer, or lacks an end-of-text token.
    """
    try:
        json.loads(content)
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"{name}: expected a tokenizer.json of the tokenizers library, found something else ({error})"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a text is text: it ends no document
    end_of_text_id(tokenizer, name)
    return tokenizer


def end_of_text_id(tokenizer: tokenizers.Tokenizer, name: str = "the tokenizer") -> int:
    """Id of the token that ends a document.

    Raises:
      UserError: there is none.
    """
    for token in _END_OF_TEXT_NAMES:
        if (token_id := tokenizer.token_to_id(token)) is not None:
            return token_id
    raise UserError(
        f"{name}: has no end-of-text token; expected one of {', '.join(_END_OF_TEXT_NAMES)}: add one as a special token"
    )


def vocab_size(tokenizer: tokenizers.Tokenizer) -> int:
    """Smallest number that is larger than every token id."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())


def encode(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each text, int64 [tokens], without any special token."""
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, np.int64) for encoding in encodings]
