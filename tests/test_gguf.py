"""GGUF files against transformers' own reading of them."""

import pathlib

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from mlpmem_jax.core.errors import UserError
from mlpmem_jax.core.gguf_file import GGUFFile
from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.corpus import gguf_tokenizer, tokenizer
from mlpmem_jax.interop import gguf_model, published
from mlpmem_jax.models import language_model
from mlpmem_jax.models.rotary import Rotary

ROOT = pathlib.Path(__file__).parents[1]
SMOLLM2 = ROOT / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
WIDTH, HEADS, KEY_VALUE_HEADS, BLOCKS, FEED_FORWARD = 64, 4, 2, 2, 96
TEXTS = [
    "In 2019, 1,234 people didn't  know;\n\nwhat's \t new? naïve 東京 👍🏽",
    "",
    " def f(x):\n    return x**2  # 42",
]


def vocabulary() -> list[str]:
    """Bytes as GPT-2 writes them, a few merges, and two special tokens."""
    alphabet = sorted(tokenizer.pre_tokenizers.ByteLevel.alphabet())
    return ["<|endoftext|>", "<|im_end|>", *alphabet, "in", "on", "Ġt", "er", "Ġw"]


def permuted(weight, heads):
    """Rows of a query or key projection in llama.cpp's order (its convert_hf_to_gguf.py)."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(
    path,
    quantization="F32",
    tied=True,
    pre="smollm",
    changed=None,
    left_out=(),
    tokens=True,
    bos=False,
    metadata=None,
    endianess=gguf.GGUFEndian.LITTLE,
):
    """A small random model; `changed` replaces tensors and what else is named here, `metadata` sets keys."""
    rng, words, changed = np.random.default_rng(0), vocabulary(), changed or {}
    writer = gguf.GGUFWriter(str(path), changed.get("architecture", "llama"), endianess=endianess)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(words))
    if tokens:
        writer.add_tokenizer_model(changed.get("tokenizer", "gpt2"))
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(words)
        writer.add_token_types([3, 3] + [1] * (len(words) - 2))
        writer.add_token_merges(["i n", "o n", "Ġ t", "e r", "Ġ w"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_add_bos_token(bos)
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for name, value in (metadata or {}).items():
        add[type(value)](name, value)
    key_value_width = WIDTH // HEADS * KEY_VALUE_HEADS
    shapes = {"token_embd": (len(words), WIDTH), "output_norm": (WIDTH,)}
    if not tied:
        shapes["output"] = (len(words), WIDTH)
    for block in range(BLOCKS):
        shapes |= {
            f"blk.{block}.attn_norm": (WIDTH,),
            f"blk.{block}.attn_q": (WIDTH, WIDTH),
            f"blk.{block}.attn_k": (key_value_width, WIDTH),
            f"blk.{block}.attn_v": (key_value_width, WIDTH),
            f"blk.{block}.attn_output": (WIDTH, WIDTH),
            f"blk.{block}.ffn_norm": (WIDTH,),
            f"blk.{block}.ffn_gate": (FEED_FORWARD, WIDTH),
            f"blk.{block}.ffn_up": (FEED_FORWARD, WIDTH),
            f"blk.{block}.ffn_down": (WIDTH, FEED_FORWARD),
        }
    for name, shape in shapes.items():
        if name in left_out:
            continue
        values = changed.get(name, rng.normal(size=shape).astype(np.float32) * (1 if len(shape) == 1 else 0.2))
        if name.endswith("attn_q"):
            values = permuted(values, HEADS)
        if name.endswith("attn_k"):
            values = permuted(values, KEY_VALUE_HEADS)
        kind = gguf.GGMLQuantizationType[quantization if len(shape) > 1 else "F32"]
        if kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(f"{name}.weight", values)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def one_device():
    return Sharding(make_mesh(devices=jax.devices()[:1]))


def our_logits(parameters, config, tokens_BxT):
    hidden, _ = language_model.features(parameters, config, jnp.asarray(tokens_BxT), compute_dtype=jnp.float32)
    return np.asarray(hidden @ language_model.output_kernel(parameters))[..., : config.vocab_size]


def their_logits(path, tokens_BxT):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        return model(torch.tensor(tokens_BxT)).logits.numpy()


@pytest.mark.parametrize(
    ("quantization", "tied"), [("F32", True), ("F16", False), ("BF16", True), ("Q8_0", False), ("Q4_1", True)]
)
def test_logits_are_those_of_transformers(tmp_path, quantization, tied):
    path = write(tmp_path / "model.gguf", quantization, tied)
    parameters, config = gguf_model.load_language_model(str(path), one_device())
    assert config.tied is tied
    tokens = np.random.default_rng(1).integers(len(vocabulary()), size=(2, 40))
    expected = their_logits(path, tokens)
    np.testing.assert_allclose(our_logits(parameters, config, tokens), expected, atol=1e-4 * np.abs(expected).max())
    assert published.dimensions(str(path)) == config


def test_the_dimensions_of_a_published_file_are_known_before_it_is_fetched(tmp_path):
    config = published.dimensions(str(tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"))
    assert language_model.parameter_count(config) == 134_515_008  # of the model on huggingface.co
    with pytest.raises(UserError, match=r"Other\.gguf: no such file"):
        published.dimensions(str(tmp_path / "Other.gguf"))


def test_a_sharded_model_is_the_same(tmp_path):
    path = write(tmp_path / "model.gguf", "Q8_0")
    whole, _ = gguf_model.load_language_model(str(path), one_device())
    sharded, _ = gguf_model.load_language_model(str(path), Sharding(make_mesh(1, 2, 2, devices=jax.devices()[:4])))
    for left, right in zip(jax.tree.leaves(whole), jax.tree.leaves(sharded), strict=True):
        np.testing.assert_array_equal(left, right)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(sharded))


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_every_text_survives_the_tokenizer(tmp_path, pre):
    actual, _ = gguf_tokenizer.load(str(write(tmp_path / "model.gguf", pre=pre)))
    for text in TEXTS:
        assert actual.decode(actual.encode(text, add_special_tokens=False).ids) == text
    assert actual.token_to_id("<|im_end|>") == 1


def test_token_ids_are_those_of_transformers(tmp_path):
    path = write(tmp_path / "model.gguf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    ours, _ = gguf_tokenizer.load(str(path))
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=False).ids == theirs(text, add_special_tokens=False).input_ids


def test_digits_stand_alone_where_the_model_was_trained_so(tmp_path):
    ours, _ = gguf_tokenizer.load(str(write(tmp_path / "model.gguf", pre="smollm")))
    pieces = [piece for piece, _ in ours.pre_tokenizer.pre_tokenize_str("in 2019")]
    assert pieces == ["in", "Ġ", "2", "0", "1", "9"]


def test_a_model_that_expects_a_token_before_the_text_says_so_in_its_post_processor(tmp_path):
    ours, _ = gguf_tokenizer.load(str(write(tmp_path / "model.gguf", bos=True)))
    assert ours.encode("on").ids == [0, *ours.encode("on", add_special_tokens=False).ids]


def damaged(tmp_path, keep):
    path = write(tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    return path


NARROW, NOT_FINITE = np.zeros((8, 64), np.float32), np.full(64, np.nan, np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"changed": {"architecture": "gemma"}}, "general.architecture is 'gemma'; only 'llama'"),
        ({"left_out": ("blk.1.ffn_up",)}, r"tensor 'blk.1.ffn_up.weight' of shape \(96, 64\) is missing"),
        ({"changed": {"blk.0.attn_v": NARROW}}, r"'blk.0.attn_v.weight' is \(8, 64\); the metadata"),
        ({"changed": {"blk.1.ffn_norm": NOT_FINITE}}, "'blk.1.ffn_norm.weight' has values that are not"),
        ({"endianess": gguf.GGUFEndian.BIG}, "its byte order is not that of this machine"),
        ({"metadata": {"split.count": 3}}, "is one of 3 parts of a model; join them with"),
        ({"metadata": {"llama.block_count": "2"}}, "llama.block_count is '2'; expected a whole number above 0"),
        ({"metadata": {"llama.attention.head_count_kv": [2, 4]}}, r"head_count_kv is '\[2, 4\]'; expected a whole"),
        ({"metadata": {"llama.attention.head_count": 0}}, "head_count is '0'; expected a whole number above 0"),
        ({"metadata": {"llama.attention.head_count_kv": 3}}, "head_count_kv, 3, does not divide head_count, 4"),
        ({"metadata": {"llama.rope.freq_base": float("nan")}}, "freq_base is 'nan'; expected a number above 0"),
    ],
)
def test_a_model_that_cannot_be_imported_is_one_clear_error(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        gguf_model.load_language_model(str(write(tmp_path / "model.gguf", **changes)), one_device())


@pytest.mark.parametrize(
    ("metadata", "factor"),
    [
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, 4.0),
        ({"llama.rope.scaling.factor": 4.0}, 4.0),  # the type that llama.cpp takes where none is named
        ({"llama.rope.scale_linear": 4.0}, 4.0),  # the key of old files
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
        ({"llama.rope.scaling.factor": 0.0}, None),
    ],
)
def test_scaled_positions_are_those_of_llama_cpp(tmp_path, metadata, factor):
    expected = Rotary(type="linear", factor=factor) if factor else Rotary()
    assert gguf_model.read_config(GGUFFile(write(tmp_path / "model.gguf", metadata=metadata))).rotary == expected


@pytest.mark.parametrize(
    "metadata",
    [
        {"tokenizer.ggml.eos_token_id": 10**6},
        {"tokenizer.ggml.merges": ["in"]},
        {"tokenizer.ggml.token_type": [1, 1]},
        {"tokenizer.ggml.tokens": ["a", "b"]},
    ],
)
def test_a_damaged_tokenizer_is_one_clear_error(tmp_path, metadata):
    with pytest.raises(UserError, match=r"model\.gguf: its tokenizer is damaged"):
        gguf_tokenizer.load(str(write(tmp_path / "model.gguf", metadata=metadata)))


@pytest.mark.parametrize("keep", [0, 3, 200, 3000])
def test_a_truncated_file_is_one_clear_error(tmp_path, keep):
    with pytest.raises(UserError, match="expected a GGUF file, found something else, or a damaged one"):
        GGUFFile(damaged(tmp_path, keep))


def test_a_file_that_is_not_there_says_what_fetches_it(tmp_path):
    with pytest.raises(UserError, match="no such file; expected a GGUF file; `make smollm2-model` fetches it"):
        GGUFFile(tmp_path / SMOLLM2.name)


def test_a_file_without_a_tokenizer_or_with_another_kind_says_what_to_take(tmp_path):
    with pytest.raises(UserError, match=r"has no tokenizer .*set config.tokenizer.source to 'file'"):
        gguf_tokenizer.load(str(write(tmp_path / "none.gguf", tokens=False)))
    with pytest.raises(UserError, match=r"of the kind 'llama' .*tokenizer.json"):
        gguf_tokenizer.load(str(write(tmp_path / "other.gguf", changed={"tokenizer": "llama"})))


@pytest.mark.slow
def test_smollm2_is_the_model_that_transformers_reads():
    parameters, config = gguf_model.load_language_model(str(SMOLLM2), one_device())
    lines = (ROOT / "README.md").read_text().splitlines()
    theirs = transformers.AutoTokenizer.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name)
    ours, _ = gguf_tokenizer.load(str(SMOLLM2))
    expected = theirs(lines, add_special_tokens=False).input_ids
    assert [encoding.ids for encoding in ours.encode_batch(lines, add_special_tokens=False)] == expected
    tokens = np.concatenate([np.array(ids, int) for ids in expected])[:512].reshape(2, 256)
    logits = their_logits(SMOLLM2, tokens)
    np.testing.assert_allclose(our_logits(parameters, config, tokens), logits, atol=1e-4 * np.abs(logits).max())
