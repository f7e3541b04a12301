"""Generation with a cache against whole forward passes, transformers, and distributions mixed in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mlpmem_jax.core.errors import UserError
from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.inference import decoding, drafting, sampling
from mlpmem_jax.inference.decoding import DecoderConfig, Parameters, Reading, can_change_the_likeliest, prepare
from mlpmem_jax.inference.generate import draw, first_tokens, generate
from mlpmem_jax.inference.sampling import GREEDY, Sampling
from mlpmem_jax.interop import huggingface
from mlpmem_jax.models import gpt2, language_model, memory

BASE = gpt2.GPT2Config(vocab_size=40, context_length=64, width=16, blocks=2, heads=2)
MEMORY = memory.MemoryConfig("gpt2", 40, 48, 16, 24, 2, 48)
PROMPTS = [[3, 9, 27], [5, 1, 17, 30, 8, 8, 21], [11]]
ALONE = DecoderConfig(BASE)
BOTH = DecoderConfig(BASE, MEMORY, input_block=1)


def scaled(parameters):
    """Parameters large enough that different contexts have clearly different next tokens."""
    return jax.tree.map(lambda array: array * 12 if array.ndim > 2 else array, parameters)


@pytest.fixture(scope="module")
def base():
    return scaled(jax.jit(gpt2.init, static_argnums=0)(BASE, jax.random.key(0)))


@pytest.fixture(scope="module")
def memory_parameters():
    parameters = scaled(jax.jit(memory.init, static_argnums=0)(MEMORY, jax.random.key(1)))
    return {**parameters, "lm_head": {"kernel": 20 * parameters["lm_head"]["kernel"]}}


def softmax(logits):
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


@jax.jit
def whole_forward_pass(base, memory_parameters, tokens_1xT):
    """(logits of the base, logits of the memory) at every position."""
    _, block_inputs = language_model.features(base, BASE, tokens_1xT, input_blocks=(BOTH.input_block,))
    memory_logits = memory_parameters and memory.logits(memory_parameters, MEMORY, block_inputs[BOTH.input_block])
    return language_model.logits(base, BASE, tokens_1xT), memory_logits


def distribution(base, memory_parameters, weight, tokens):
    """p(next token) after `tokens`, float64 [V], from a whole forward pass and probabilities mixed outside JAX."""
    later_tokens_are_not_seen = [*tokens, *[0] * (40 - len(tokens))]
    base_logits, memory_logits = whole_forward_pass(base, memory_parameters, np.asarray([later_tokens_are_not_seen]))
    p = softmax(np.asarray(base_logits, np.float64)[0, len(tokens) - 1])
    if memory_parameters is None:
        return p
    return weight * softmax(np.asarray(memory_logits, np.float64)[0, len(tokens) - 1])[:40] + (1 - weight) * p


def continued(base, memory_parameters, weight, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(distribution(base, memory_parameters, weight, tokens))))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("weight", [None, 0.4])
def test_greedy_tokens_are_those_of_uncached_forward_passes(base, memory_parameters, weight):
    models = ALONE if weight is None else BOTH
    memory_parameters = None if weight is None else memory_parameters
    parameters = prepare(Parameters(base, memory_parameters, weight))
    together = generate(models, parameters, PROMPTS, count=6)
    for prompt, new in zip(PROMPTS, together, strict=True):
        assert new.tolist() == continued(base, memory_parameters, weight, prompt, 6)
    assert len({tuple(new.tolist()) for new in together}) == len(PROMPTS)


DRAFTED = 24  # tokens


def drafted(parameters, prompts, most, end=-1):
    tokens_BxT = np.array([[0] * (8 - len(prompt)) + prompt for prompt in prompts])
    padding_B, key, room = np.array([8 - len(prompt) for prompt in prompts]), jax.random.key(0), 8 + DRAFTED
    first_B, cache = first_tokens(BOTH, parameters, tokens_BxT, padding_B, key, room=room, sampling=GREEDY)
    return drafting.greedy_tokens(BOTH, parameters, cache, first_B, end, count=DRAFTED, most=most)


@pytest.mark.parametrize("weight", [0.003, 0.01, 0.15])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
def test_drafts_that_wait_change_no_token(base, memory_parameters, weight, prompts):
    """Where drafts are mostly right, half of them, and none; and where one sequence of a batch ends early."""
    parameters = prepare(Parameters(base, memory_parameters, weight))
    expected = [continued(base, memory_parameters, weight, prompt, DRAFTED) for prompt in prompts]
    actual = drafted(parameters, prompts, 8)
    np.testing.assert_array_equal(actual.tokens_BxT, expected)
    assert actual.memory_passes < actual.base_steps or weight == 0.15
    assert actual.base_steps > DRAFTED - 1 or weight != 0.01  # steps behind a wrong draft are done again
    end = expected[0][DRAFTED // 2]
    for row, whole in zip(drafted(parameters, prompts, 8, end).tokens_BxT.tolist(), expected, strict=True):
        place = whole.index(end) if end in whole else DRAFTED
        assert row == whole[:place] + [end] * (DRAFTED - place)


def test_right_drafts_save_passes_of_the_memory(base):
    """Beside a memory that is sure of nothing every draft is right, and for none is that known before the check."""
    flat = jax.tree.map(jnp.zeros_like, memory.init(MEMORY, jax.random.key(1)))
    parameters = prepare(Parameters(base, flat, 0.999))
    one, several = (drafted(parameters, PROMPTS[:1], most) for most in (1, 8))
    np.testing.assert_array_equal(one.tokens_BxT, several.tokens_BxT)
    assert one.base_steps == several.base_steps == DRAFTED - 1 == one.memory_passes
    assert several.memory_passes == 7  # 1, 2, ... 6 drafts at once, and two at the end


def rounded(parameters, dtype):
    """Parameters whose matrices and embeddings have values of that dtype, all float32."""
    return jax.tree.map(lambda array: array.astype(dtype).astype(jnp.float32) if array.ndim > 1 else array, parameters)


@pytest.mark.parametrize(("dtype", "apart"), [("float32", 1e-6), ("bfloat16", 0.02)])
def test_prefill_and_step_give_the_mixture_of_both_models(base, memory_parameters, dtype, apart):
    base, memory_parameters = rounded(base, dtype), rounded(memory_parameters, dtype)
    parameters = prepare(Parameters(base, memory_parameters, 0.3), dtype)
    tokens_BxT = np.array([[0, 0, *PROMPTS[1][:4]], PROMPTS[1][:6]])
    prefill = jax.jit(decoding.prefill, static_argnums=(0, 4))
    before, cache = prefill(BOTH, parameters, tokens_BxT, np.array([2, 0]), 9)
    assert {array.dtype for array in cache.keys + cache.values} == {jnp.dtype(dtype)}
    after, _ = jax.jit(decoding.step, static_argnums=0)(BOTH, parameters, cache, np.array([7, 12]))
    for row, (prompt, token) in enumerate(((PROMPTS[1][:4], 7), (PROMPTS[1][:6], 12))):
        for reading, tokens in ((before, prompt), (after, [*prompt, token])):
            memory_log = decoding.memory_log_probabilities(BOTH, parameters, reading)
            mixed = np.exp(decoding.mix(reading.base_log_BxV, memory_log, 0.3))
            expected = distribution(base, memory_parameters, 0.3, tokens)
            np.testing.assert_allclose(mixed[row], expected, rtol=1e-4, atol=apart)


def test_greedy_tokens_are_those_of_transformers(tmp_path):
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=40, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    parameters, config = huggingface.load_language_model(str(tmp_path), Sharding(make_mesh(1, 1, 1, jax.devices()[:1])))
    expected = model.generate(
        torch.tensor([PROMPTS[1]]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, len(PROMPTS[1]) :]
    actual = generate(DecoderConfig(config), prepare(Parameters(parameters)), [PROMPTS[1]], count=6)
    assert actual[0].tolist() == expected.tolist()


def test_generation_stops_at_the_end_of_text(base):
    parameters = prepare(Parameters(base))
    free = [new.tolist() for new in generate(ALONE, parameters, PROMPTS, count=6)]
    end = free[0][3]
    stopped = generate(ALONE, parameters, PROMPTS, count=6, end_token=end)
    for new, whole in zip(stopped, free, strict=True):
        assert new.tolist() == (whole[: whole.index(end)] if end in whole else whole)
    assert len(stopped[0]) <= 3


@pytest.fixture(scope="module")
def draws(memory_parameters):
    """A function of (p_LM, weight, sampling, number of draws): tokens drawn beside a memory, and its p_MLP."""
    input_1xD = np.random.default_rng(4).normal(size=(1, BASE.width)).astype(np.float32)
    memory_p_V = softmax(np.asarray(memory.logits(memory_parameters, MEMORY, input_1xD), np.float64))[0, :40]

    def drawn(base_p_V, weight, how, count, memory_parameters=memory_parameters):
        models, parameters = (
            (ALONE, Parameters({})) if weight is None else (BOTH, Parameters({}, memory_parameters, weight))
        )
        reading = Reading(jnp.tile(jnp.log(base_p_V), (count, 1)), jnp.tile(input_1xD, (count, 1)))
        return np.asarray(draw(models, parameters, reading, jax.random.key(3), how)), memory_p_V

    return drawn


@pytest.mark.parametrize("how", [Sampling(1.0), Sampling(1.5)])
@pytest.mark.parametrize("weight", [None, 0.3])
def test_draws_follow_the_distribution(draws, weight, how):
    base_p = softmax(np.random.default_rng(5).normal(0, 2, 40))
    tokens, memory_p = draws(base_p, weight, how, 4000)
    mixed = base_p if weight is None else weight * memory_p + (1 - weight) * base_p
    expected = softmax(np.log(mixed) / how.temperature)
    actual = np.bincount(tokens, minlength=40) / 4000
    assert np.all(np.abs(actual - expected) < 5 * np.sqrt(expected / 4000) + 1e-3)


def test_greedy_takes_the_likeliest_of_the_mixture_and_lets_the_memory_rest_where_it_can(draws, memory_parameters):
    broken = jax.tree.map(lambda array: array * np.nan, memory_parameters)
    certain, open_ = np.full(40, 0.3 / 39), np.full(40, 0.6 / 39)
    certain[7], open_[7] = 0.7, 0.4
    for base_p, rests in ((certain, True), (open_, False)):
        tokens, memory_p = draws(base_p, 0.39, GREEDY, 2)
        assert np.all(tokens == np.argmax(0.39 * memory_p + 0.61 * base_p))
        assert np.all(draws(base_p, 0.39, GREEDY, 2, broken)[0] == 7) == rests
    assert np.all(draws(certain, 1e-6, Sampling(1.0), 2, broken)[0] < 40)


def test_the_seed_decides_the_draws(base):
    first, again, other = (
        generate(ALONE, prepare(Parameters(base)), PROMPTS, count=6, sampling=Sampling(3.0), seed=seed)
        for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@settings(deadline=None)
@given(
    base_p=arrays(np.float64, 5, elements=st.floats(0.01, 1)),
    memory_p=arrays(np.float64, 5, elements=st.floats(0, 1)),
    weight=st.floats(0, 1),
)
def test_a_likeliest_token_said_to_be_certain_is(base_p, memory_p, weight):
    base_p, memory_p = base_p / base_p.sum(), memory_p / max(memory_p.sum(), 1e-9)
    second, first = np.sort(base_p)[-2:]
    if abs((1 - weight) * (first - second) - weight) < 1e-5:
        return  # float32 may round to either side
    if not can_change_the_likeliest(jnp.log(base_p)[None], weight)[0]:
        assert np.argmax(weight * memory_p + (1 - weight) * base_p) == np.argmax(base_p)
    else:
        worst = np.zeros(5)
        worst[np.argsort(base_p)[-2]] = 1
        assert np.argmax(weight * worst + (1 - weight) * base_p) == np.argmax(worst)


def test_top_k_and_top_p_keep_the_likeliest_tokens():
    random = np.random.default_rng(0)
    log_p = np.log(softmax(3 * random.normal(size=(20, 30)))).astype(np.float32)
    for top_k, top_p in ((5, 1.0), (0, 0.7), (8, 0.5), (0, 1e-6), (100, 1.0)):
        kept = np.asarray(sampling.keep(log_p, Sampling(1.0, top_k, top_p)))
        for row, actual in zip(log_p, kept, strict=True):
            order = np.argsort(-row)[: top_k or None]
            mass = np.cumsum(np.exp(row[order], dtype=np.float64)) / np.exp(row[order], dtype=np.float64).sum()
            count = len(order) if top_p == 1 else int(np.searchsorted(mass, top_p)) + 1
            assert set(np.flatnonzero(np.isfinite(actual))) == set(order[:count])


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": 1e-60},  # 0 in float32
        {"temperature": 1e300},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1e-60},
        {"top_p": 1.5},
    ],
)
def test_sampling_out_of_range_is_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        dataclasses.replace(Sampling(), **wrong)


def test_too_long_and_empty_prompts_are_refused(base):
    with pytest.raises(UserError, match="context"):
        generate(ALONE, Parameters(base), [[1] * 60], count=5)
    with pytest.raises(UserError, match="prompt"):
        generate(ALONE, Parameters(base), [[1], []], count=5)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_ends_of_the_interpolation_are_one_model_exactly(weight):
    base_log, memory_log = jnp.log(jnp.array([[0.2, 0.3, 0.5]])), jnp.log(jnp.array([[0.9, 0.1, 0.0]]))
    np.testing.assert_array_equal(decoding.mix(base_log, memory_log, weight), memory_log if weight else base_log)


def test_tokens_that_the_memory_does_not_know_keep_the_share_of_the_base(base):
    config = dataclasses.replace(MEMORY, vocab_size=30)
    models, parameters = DecoderConfig(BASE, config, 1), Parameters(base, memory.init(config, jax.random.key(0)), 0.25)
    reading = Reading(jnp.log(jnp.full((1, 40), 1 / 40)), jnp.ones((1, 16)))
    memory_log = decoding.memory_log_probabilities(models, parameters, reading)
    mixed = np.exp(decoding.mix(reading.base_log_BxV, memory_log, 0.25))
    assert mixed.sum() == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(mixed[0, 30:], 0.75 / 40, rtol=1e-5)


@pytest.mark.parametrize(
    ("backend", "blocks", "expected"), [("cpu", 30, 1), ("gpu", 1, 1), ("gpu", 30, drafting.MOST_DRAFTS)]
)
def test_only_a_base_with_a_large_memory_drafts_and_not_on_a_cpu(monkeypatch, backend, blocks, expected):
    monkeypatch.setattr(drafting.jax, "default_backend", lambda: backend)
    large_or_small = dataclasses.replace(MEMORY, blocks=blocks, width=8)
    assert drafting.most_drafts(dataclasses.replace(BOTH, memory=large_or_small)) == expected
