"""Tokenizers of the `tokenizers` library: trained here, from a file, or by Hugging Face name."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence

import ml_collections
import numpy as np
import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from mlpmem_jax.core import storage
from mlpmem_jax.core.errors import UserError, require
from mlpmem_jax.corpus import gguf_tokenizer

END_OF_TEXT = "<|endoftext|>"
_FILE, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_GROWING = " \u00a0\u0344\u0390\ufb2c\ufdfa\U0001d160"  # what Unicode normalization and "▁" lengthen most
# The names of the end-of-text token in other tokenizer families.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]")


def train(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE like GPT-2's: it can encode any text, and decoding restores the text unchanged.

    The same texts in the same order give the same tokenizer, regardless of the number of threads.

    Args:
      texts: documents; read once.
      vocab_size: number of tokens, including 256 bytes and the end of text; fewer if the texts do not have that many.
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


def load(config: ml_collections.ConfigDict) -> tuple[tokenizers.Tokenizer, str]:
    """(the tokenizer of a file or a Hugging Face name, the token that ends a document).

    Args:
      config: the group `tokenizer`, with source "file" (a tokenizer.json or its folder), "gguf" or "hub".

    Raises:
      UserError: it cannot be loaded, or it has no end-of-text token.
    """
    if config.source == "gguf":
        parsed, own_end = gguf_tokenizer.load(config.path)
        content, name = parsed.to_str().encode(), config.path
    elif config.source == "file":
        file = epath.Path(config.path).expanduser()
        file = file / _FILE if file.is_dir() else file
        if not storage.is_file(file):
            raise UserError(f"config.tokenizer.path: {file} does not exist; expected a tokenizer.json or its folder")
        content, name, own_end = file.read_bytes(), str(file), _end_beside(file)
    else:
        file = _download(config.path)
        content, name, own_end = file.read_bytes(), config.path, _end_beside(file)
    tokenizer = from_bytes(content, name)
    _only_begin(tokenizer)
    return tokenizer, _end_of_text(tokenizer, config.end_of_text, own_end, name)


def _download(path: str) -> epath.Path:
    """Downloads the tokenizer.json of NAME or NAME@REVISION from the hub, and tokenizer_config.json if it exists."""
    hub = require("huggingface_hub", extra="hub")
    name, _, revision = path.partition("@")
    try:
        file = hub.hf_hub_download(name, _FILE, revision=revision or None)
        with contextlib.suppress(hub.errors.EntryNotFoundError):
            hub.hf_hub_download(name, _SETTINGS, revision=revision or None)
    except Exception as error:  # the hub's client raises errors of several libraries
        raise UserError(f"config.tokenizer.path: {path!r} could not be loaded: {error}") from error
    return epath.Path(file)


def _end_beside(file: epath.Path) -> str:
    """The `eos_token` in the tokenizer_config.json next to a tokenizer.json; "" if there is none."""
    settings = file.parent / _SETTINGS
    try:
        token = json.loads(settings.read_bytes()).get("eos_token") if settings.exists() else None
    except (ValueError, AttributeError) as error:
        raise UserError(f"{settings}: expected the settings of a tokenizer, could not read them: {error}") from error
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def _end_of_text(tokenizer: tokenizers.Tokenizer, requested: str, own: str, name: str) -> str:
    """The requested token, or else a common name from pretraining, or else the tokenizer's own (for chat turns)."""
    if requested and tokenizer.token_to_id(requested) is None:
        raise UserError(f"config.tokenizer.end_of_text: {requested!r} is not a token of {name}")
    for token in [requested] if requested else (*_END_OF_TEXT_NAMES, own):
        if token and tokenizer.token_to_id(token) is not None:
            return token
    raise UserError(
        f"{name}: has no end-of-text token; expected one of {', '.join(_END_OF_TEXT_NAMES)}, or the eos_token of "
        f"{_SETTINGS} next to it: set config.tokenizer.end_of_text to the token that it uses"
    )


def _only_begin(tokenizer: tokenizers.Tokenizer) -> None:
    """Keeps only special tokens that the tokenizer puts before a text: a prompt has no end."""
    before, after = _around(tokenizer)
    if after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A"], special_tokens=list(before.items())
        )


def _around(tokenizer: tokenizers.Tokenizer) -> tuple[dict[str, int], dict[str, int]]:
    """Token -> id of the special tokens that the tokenizer puts before and after a text."""
    if tokenizer.post_processor is None:
        return {}, {}
    word = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).encode("a")
    framed = tokenizer.post_processor.process(word)
    text = framed.special_tokens_mask.index(0)
    tokens = list(zip(framed.tokens, framed.ids, strict=True))
    return dict(tokens[:text]), dict(tokens[text + 1 :])


def from_bytes(content: bytes, name: str) -> tokenizers.Tokenizer:
    """The tokenizer from the content of a tokenizer.json, ready for `encode`.

    Raises:
      UserError: the content is not a tokenizer.
    """
    try:
        json.loads(content)
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{name}: expected a tokenizer.json of the tokenizers library ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a text is plain text and does not end a document
    return tokenizer


def begin_ids(tokenizer: tokenizers.Tokenizer) -> list[int]:
    """Ids of the tokens that the tokenizer's post-processor puts before a text: `<s>` for Llama 2, none for GPT-2."""
    return list(_around(tokenizer)[0].values())


def vocab_size(tokenizer: tokenizers.Tokenizer, end_of_text: str) -> int:
    """One more than the largest token id that a document can have.

    Special tokens that were added to a finished model, such as a `[PAD]` for batches, do not occur in documents, so the
    language model needs no row for them.
    """
    framing = {tokenizer.token_to_id(end_of_text), *begin_ids(tokenizer)}
    own = set(tokenizer.get_vocab(with_added_tokens=False).values())
    added = tokenizer.get_added_tokens_decoder()
    unused = {place for place, token in added.items() if token.special} - own - framing
    return 1 + max(set(tokenizer.get_vocab(with_added_tokens=True).values()) - unused)


def unknown_token(tokenizer: tokenizers.Tokenizer) -> tuple[str, int] | None:
    """(text, id) of the token that stands for all characters that the tokenizer does not know; None if it has none."""
    model = json.loads(tokenizer.to_str())["model"]
    token = model.get("unk_token")
    if model.get("unk_id") is not None:
        token = tokenizer.id_to_token(model["unk_id"])
    place = tokenizer.token_to_id(token) if token else None
    return None if place is None else (token, place)


def growth(tokenizer: tokenizers.Tokenizer) -> int:
    """The maximum factor by which the tokenizer's normalizer can lengthen a text, in bytes."""
    if tokenizer.normalizer is None:
        return 1
    lengths = ((len(tokenizer.normalizer.normalize_str(c * 64).encode()), 64 * len(c.encode())) for c in _GROWING)
    return max(1, *(-(-after // before) for after, before in lengths))


def encode(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each text, int64 [tokens], without special tokens.

    Raises:
      UserError: the tokenizer has no token for a part of a text.
    """
    try:
        encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"config.tokenizer: a text cannot be encoded ({error}); the tokenizer has no token for some of its "
            "characters and no unknown token: add an unknown token, or use another tokenizer"
        ) from error
    return [np.array(encoding.ids, np.int64) for encoding in encodings]
