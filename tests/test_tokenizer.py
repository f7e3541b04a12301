import itertools
import json
import os
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import default
from mlpmem_jax.core.errors import UserError
from mlpmem_jax.corpus import tokenizer

TEXTS = [
    f"the {a} {b} of the {c}, naïve {a}{b}\n" for a, b, c in itertools.permutations(["red", "fox", "sea", "lamp"], 3)
]


def config_of(source, path):
    config = default.get_config().tokenizer
    config.source, config.path = source, str(path)
    return config


def ready(built):
    return tokenizer.from_bytes(built.to_str().encode(), "test")


@pytest.fixture(scope="module")
def trained():
    return ready(tokenizer.train(iter(TEXTS), 290))


@settings(max_examples=50)
@given(st.text())
def test_decoding_gives_the_text_back(trained, text):
    (ids,) = tokenizer.encode(trained, [text])
    assert trained.decode(ids.tolist(), skip_special_tokens=False) == text
    assert ids.max(initial=0) < tokenizer.vocab_size(trained, tokenizer.END_OF_TEXT)


def test_frequent_words_become_tokens(trained):
    assert tokenizer.vocab_size(trained, tokenizer.END_OF_TEXT) == 290
    (ids,) = tokenizer.encode(trained, [" the red fox"])
    assert len(ids) <= 4


def test_a_text_that_names_the_end_of_text_does_not_end(trained):
    texts = ["a<|endoftext|>b", "<|endoftext|>"]
    encoded = tokenizer.encode(trained, texts)
    assert all(trained.token_to_id(tokenizer.END_OF_TEXT) not in ids for ids in encoded)
    assert [trained.decode(ids.tolist()) for ids in encoded] == texts


def test_encoding_is_that_of_each_text_alone(trained):
    for text, ids in zip(TEXTS, tokenizer.encode(trained, TEXTS), strict=True):
        np.testing.assert_array_equal(ids, trained.encode(text, add_special_tokens=False).ids)


def test_training_is_the_same_with_any_number_of_threads():
    script = (
        "import sys; from mlpmem_jax.corpus import tokenizer; import random; random.seed(0)\n"
        "words = [''.join(random.choices('abcdeé ', k=random.randrange(1, 9))) for _ in range(3000)]\n"
        "sys.stdout.write(tokenizer.train(words, 700).to_str())\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={
                **os.environ,
                "PYTHONHASHSEED": seed,
                "TOKENIZERS_PARALLELISM": parallel,
                "RAYON_NUM_THREADS": threads,
            },
            capture_output=True,
            check=True,
        ).stdout
        for seed, parallel, threads in [("1", "false", "1"), ("2", "true", "1"), ("3", "true", "5")]
    }
    assert len(outputs) == 1
    assert len(json.loads(outputs.pop())["model"]["vocab"]) == 700


def test_a_file_or_its_folder_can_be_loaded(tmp_path, trained):
    trained.enable_truncation(2)
    trained.save(str(tmp_path / "tokenizer.json"))
    trained.no_truncation()
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded, end = tokenizer.load(config_of("file", path))
        assert end == tokenizer.END_OF_TEXT
        np.testing.assert_array_equal(tokenizer.encode(loaded, TEXTS)[3], tokenizer.encode(trained, TEXTS)[3])


def words(special=(), names=("a", "[UNK]")):
    """A tokenizer of whole words, with special tokens added."""
    model = tokenizers.models.WordLevel({name: place for place, name in enumerate(names)}, unk_token="[UNK]")
    built = tokenizers.Tokenizer(model)
    built.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    built.add_special_tokens(list(special))
    return built


def test_other_names_of_the_end_of_text(tmp_path):
    file, config = tmp_path / "tokenizer.json", config_of("file", tmp_path)
    words(["</s>"]).save(str(file))
    assert tokenizer.load(config)[1] == "</s>"
    words(["<|stop|>", "<|turn|>"]).save(str(file))
    for own in ("<|stop|>", {"content": "<|stop|>", "lstrip": False}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": own}))
        assert tokenizer.load(config)[1] == "<|stop|>"
    config.end_of_text = "<|turn|>"
    assert tokenizer.load(config)[1] == "<|turn|>"
    config.end_of_text = "<|none|>"
    with pytest.raises(UserError, match=r"config\.tokenizer\.end_of_text: '<\|none\|>' is not a token of"):
        tokenizer.load(config)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: expected the settings of a tokenizer"):
        tokenizer.load(config_of("file", tmp_path))


def test_special_tokens_that_no_document_can_have_need_no_row():
    built = words(["</s>", "[PAD]"])
    assert tokenizer.vocab_size(built, "</s>") == 3
    assert tokenizer.vocab_size(built, "[PAD]") == 4
    built.add_tokens(["b"])  # one that a text can have
    assert tokenizer.vocab_size(built, "</s>") == 5


@pytest.mark.parametrize(
    ("template", "begin"),
    [(None, []), ("$A </s>", []), ("<s> $A", ["<s>"]), ("<s> $A </s>", ["<s>"]), ("<s> [X] $A", ["<s>", "[X]"])],
)
def test_what_stands_before_a_text_is_kept_and_what_stands_after_it_is_not(tmp_path, template, begin):
    built = words(["<s>", "</s>", "[X]"])
    if template:
        special = [(name, built.token_to_id(name)) for name in ("<s>", "</s>", "[X]")]
        built.post_processor = tokenizers.processors.Sequence(
            [
                tokenizers.processors.ByteLevel(),
                tokenizers.processors.TemplateProcessing(single=template, special_tokens=special),
            ]
        )
    built.save(str(tmp_path / "tokenizer.json"))
    loaded, end = tokenizer.load(config_of("file", tmp_path))
    ids = [built.token_to_id(name) for name in begin]
    assert end == "</s>"
    assert tokenizer.begin_ids(loaded) == ids
    assert loaded.encode("a a").ids == [*ids, 0, 0]


def test_a_text_without_a_token_for_it_is_one_clear_error():
    built = ready(words(["</s>"], names=("a",)))
    with pytest.raises(UserError, match=r"config\.tokenizer: a text cannot be encoded .*no unknown token"):
        tokenizer.encode(built, ["a b"])


def test_the_token_of_unknown_text_is_known(trained):
    assert tokenizer.unknown_token(trained) is None
    assert tokenizer.unknown_token(words(names=("a", "[UNK]"))) == ("[UNK]", 1)
    assert tokenizer.unknown_token(words(names=("a",))) is None
    pieces = tokenizers.models.Unigram([("a", -1.0), ("<unk>", -9.0)], unk_id=1, byte_fallback=False)
    assert tokenizer.unknown_token(tokenizers.Tokenizer(pieces)) == ("<unk>", 1)


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_no_character_grows_more_in_a_normal_form_than_there_is_room_for(form):
    built = words()
    built.normalizer = getattr(tokenizers.normalizers, form)()
    characters = (chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    largest = max(len(unicodedata.normalize(form, c).encode()) / len(c.encode()) for c in characters)
    assert largest <= tokenizer.growth(built) < largest + 1


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path):
    file = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(file))
    with pytest.raises(UserError, match=rf"{file}: has no end-of-text token; expected one of <\|endoftext\|>, </s>"):
        tokenizer.load(config_of("file", file))


@pytest.mark.parametrize("content", ["", "not json", "{}", '{"model": {"type": "unknown"}}'])
def test_what_is_not_a_tokenizer_is_refused(tmp_path, content):
    file = tmp_path / "tokenizer.json"
    file.write_text(content)
    with pytest.raises(UserError, match=rf"{file}: expected a tokenizer\.json"):
        tokenizer.load(config_of("file", file))


def test_absent_tokenizers_are_named(tmp_path):
    with pytest.raises(UserError, match="absent does not exist"):
        tokenizer.load(config_of("file", tmp_path / "absent"))
    with pytest.raises(UserError, match=r"config\.tokenizer\.path: 'no-such/name' could not be loaded"):
        tokenizer.load(config_of("hub", "no-such/name"))
