"""Tokenizers of GGUF files, as tokenizers of the `tokenizers` library."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from mlpmem_jax.core.errors import UserError
from mlpmem_jax.core.gguf_file import GGUFFile

_SPECIAL, _USER_DEFINED = 3, 4  # token types
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
# llama.cpp's names of pre-tokenizers: (whether single digits are split off first, the regex of words).
_WORDS = {
    "gpt-2": (False, _GPT2_WORDS),
    "smollm": (True, _GPT2_WORDS),
    "llama-bpe": (False, _LLAMA3_WORDS),
    "qwen2": (False, _QWEN2_WORDS),
}


def load(path: str) -> tuple[tokenizers.Tokenizer, str]:
    """(the byte-level BPE tokenizer of a GGUF file; its end-of-text token, "" if the file names none).

    Raises:
      UserError: the file has none, or one of another kind.
    """
    file = GGUFFile(path)
    kind = file.values.get("tokenizer.ggml.model")
    if kind is None:
        raise UserError(
            f"{path}: has no tokenizer (no tokenizer.ggml.model); set config.tokenizer.source to 'file' and "
            "config.tokenizer.path to the tokenizer.json that belongs to the model"
        )
    split = file.values.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or split not in _WORDS:
        raise UserError(
            f"{path}: its tokenizer is of the kind {kind!r} with the pre-tokenizer {split!r}; only the kind 'gpt2' "
            f"with the pre-tokenizers {', '.join(map(repr, _WORDS))} is supported. Set config.tokenizer.source to "
            "'file' and config.tokenizer.path to the tokenizer.json that belongs to the model"
        )
    try:
        return _byte_level(file, split)
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception for lists that contradict each other
        raise UserError(
            f"{path}: its tokenizer is damaged ({error}); use another file, or the model's tokenizer.json "
            "(config.tokenizer.source='file')"
        ) from error


def _byte_level(file: GGUFFile, split: str) -> tuple[tokenizers.Tokenizer, str]:
    tokens = file.value("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in file.value("tokenizer.ggml.merges")]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split == "llama-bpe"))
    types = file.value("tokenizer.ggml.token_type", [1] * len(tokens))
    for kind_of_token, add in ((_SPECIAL, tokenizer.add_special_tokens), (_USER_DEFINED, tokenizer.add_tokens)):
        add(
            [
                tokenizers.AddedToken(token, normalized=False, special=kind_of_token == _SPECIAL)
                for token, token_kind in zip(tokens, types, strict=True)
                if token_kind == kind_of_token
            ]
        )
    alone, words = _WORDS[split]
    steps = [pre_tokenizers.Digits(individual_digits=True)] if alone else []
    steps += [
        pre_tokenizers.Split(tokenizers.Regex(words), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if file.value("tokenizer.ggml.add_bos_token", False):
        place = int(file.value("tokenizer.ggml.bos_token_id"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[tokens[place], "$A"], special_tokens=[(tokens[place], place)]
        )
    end = file.values.get("tokenizer.ggml.eos_token_id")
    return tokenizer, "" if end is None else tokens[int(end)]
