"""Generation with a cache against whole forward passes, transformers, and distributions mixed in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlpmem_jax.core.errors import UserError
from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.inference import generate, sampling
from mlpmem_jax.inference.generate import Models, Parameters
from mlpmem_jax.inference.sampling import Sampling
from mlpmem_jax.interop import huggingface
from mlpmem_jax.models import gpt2, memory

BASE = gpt2.GPT2Config(vocab_size=40, context_length=64, width=16, blocks=3, heads=2)
MEMORY = memory.MemoryConfig("gpt2", 40, 48, 16, 24, 2, 48)
PROMPTS = [[3, 9, 27], [5, 1, 17, 30, 8, 8, 21], [11]]
ALONE = Models(BASE)
BOTH = Models(BASE, MEMORY, input_block=2)


def scaled(parameters):
    """Parameters large enough that different contexts have clearly different next tokens."""
    return jax.tree.map(lambda array: array * 12 if array.ndim > 2 else array, parameters)


@pytest.fixture(scope="module")
def base():
    return scaled(jax.jit(gpt2.init, static_argnums=0)(BASE, jax.random.key(0)))


@pytest.fixture(scope="module")
def beside():
    parameters = scaled(jax.jit(memory.init, static_argnums=0)(MEMORY, jax.random.key(1)))
    return {**parameters, "lm_head": {"kernel": 20 * parameters["lm_head"]["kernel"]}}


def softmax(logits):
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


@jax.jit
def whole_forward_pass(base, beside, tokens_1xT):
    """(logits of the base, logits of the memory) at every position."""
    _, taps = gpt2.features(base, BASE, tokens_1xT, taps=(BOTH.input_block,))
    beside_logits = beside and memory.logits(beside, MEMORY, taps[BOTH.input_block])
    return gpt2.logits(base, BASE, tokens_1xT), beside_logits


def distribution(base, beside, weight, tokens):
    """p(next token) after `tokens`, float64 [V], from a whole forward pass and probabilities mixed outside JAX."""
    later_tokens_are_not_seen = [*tokens, *[0] * (20 - len(tokens))]
    base_logits, beside_logits = whole_forward_pass(base, beside, np.asarray([later_tokens_are_not_seen]))
    p = softmax(np.asarray(base_logits, np.float64)[0, len(tokens) - 1])
    if beside is None:
        return p
    return weight * softmax(np.asarray(beside_logits, np.float64)[0, len(tokens) - 1])[:40] + (1 - weight) * p


def continued(base, beside, weight, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(distribution(base, beside, weight, tokens))))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("weight", [None, 0.4])
def test_greedy_tokens_are_those_of_uncached_forward_passes(base, beside, weight):
    models = ALONE if weight is None else BOTH
    beside = None if weight is None else beside
    parameters = generate.prepare(Parameters(base, beside, weight))
    together = generate.generate(models, parameters, PROMPTS, count=6)
    for prompt, new in zip(PROMPTS, together, strict=True):
        assert new.tolist() == continued(base, beside, weight, prompt, 6)
    assert len({tuple(new.tolist()) for new in together}) == len(PROMPTS)


def test_prefill_and_step_give_the_mixture_of_both_models(base, beside):
    parameters = generate.prepare(Parameters(base, beside, 0.3))
    tokens_BxT = np.array([[0, 0, *PROMPTS[1][:4]], PROMPTS[1][:6]])
    prefill = jax.jit(generate.prefill, static_argnums=(0, 4))
    before, cache = prefill(BOTH, parameters, tokens_BxT, np.array([2, 0]), 9)
    after, _ = jax.jit(generate.step, static_argnums=0)(BOTH, parameters, cache, np.array([7, 12]))
    for row, (prompt, token) in enumerate(((PROMPTS[1][:4], 7), (PROMPTS[1][:6], 12))):
        for found, tokens in ((before, prompt), (after, [*prompt, token])):
            expected = distribution(base, beside, 0.3, tokens)
            np.testing.assert_allclose(np.exp(found[row]), expected, rtol=1e-4, atol=1e-6)


def test_greedy_tokens_are_those_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=40, n_positions=64, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    parameters, config = huggingface.load_gpt2(str(tmp_path), make_mesh(1, 1, 1, jax.devices()[:1]))
    expected = model.generate(
        torch.tensor([PROMPTS[1]]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, len(PROMPTS[1]) :]
    found = generate.generate(Models(config), generate.prepare(Parameters(parameters)), [PROMPTS[1]], count=12)
    assert found[0].tolist() == expected.tolist()


def test_generation_stops_at_the_end_of_text(base):
    parameters = generate.prepare(Parameters(base))
    free = [new.tolist() for new in generate.generate(ALONE, parameters, PROMPTS, count=8)]
    end = free[0][3]
    stopped = generate.generate(ALONE, parameters, PROMPTS, count=8, end_token=end)
    for new, whole in zip(stopped, free, strict=True):
        assert new.tolist() == (whole[: whole.index(end)] if end in whole else whole)
    assert len(stopped[0]) <= 3


def test_draws_follow_the_distribution_and_the_seed(base):
    parameters = generate.prepare(Parameters(base))
    draws = generate.generate(
        ALONE, parameters, [PROMPTS[0]] * 4000, count=1, sampling=Sampling(temperature=1.5), seed=3
    )
    counts = np.bincount(np.concatenate(draws), minlength=40)
    logits = np.log(distribution(base, None, None, PROMPTS[0]))
    expected = softmax(logits / 1.5)
    assert np.abs(counts / 4000 - expected).max() < 5 * np.sqrt(0.25 / 4000)

    hot = Sampling(temperature=3.0)
    first, again, other = (
        generate.generate(ALONE, parameters, PROMPTS, count=8, sampling=hot, seed=seed) for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_top_k_and_top_p_keep_the_likeliest_tokens():
    random = np.random.default_rng(0)
    log_p = np.log(softmax(3 * random.normal(size=(20, 30)))).astype(np.float32)
    for top_k, top_p in ((5, 1.0), (0, 0.7), (8, 0.5), (0, 1e-6), (100, 1.0)):
        kept = np.asarray(sampling.keep(log_p, Sampling(1.0, top_k, top_p)))
        for row, found in zip(log_p, kept, strict=True):
            order = np.argsort(-row)[: top_k or None]
            mass = np.cumsum(np.exp(row[order], dtype=np.float64)) / np.exp(row[order], dtype=np.float64).sum()
            count = len(order) if top_p == 1 else int(np.searchsorted(mass, top_p)) + 1
            assert set(np.flatnonzero(np.isfinite(found))) == set(order[:count])


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_sampling_out_of_range_is_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        dataclasses.replace(Sampling(), **wrong)


def test_too_long_and_empty_prompts_are_refused(base):
    with pytest.raises(UserError, match="context"):
        generate.generate(ALONE, Parameters(base), [[1] * 60], count=5)
    with pytest.raises(UserError, match="prompt"):
        generate.generate(ALONE, Parameters(base), [[1], []], count=5)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_ends_of_the_interpolation_are_one_model_exactly(weight):
    base_log, memory_log = jnp.log(jnp.array([[0.2, 0.3, 0.5]])), jnp.log(jnp.array([[0.9, 0.1, 0.0]]))
    np.testing.assert_array_equal(generate.mix(base_log, memory_log, weight), memory_log if weight else base_log)


def test_tokens_that_the_memory_does_not_know_keep_the_share_of_the_base():
    base_p, memory_p = np.array([[0.2, 0.3, 0.5]]), np.array([[0.9, 0.1]])
    mixed = generate.mix(jnp.log(base_p), jnp.log(memory_p), 0.25)
    np.testing.assert_allclose(np.exp(mixed), [[0.375, 0.25, 0.375]], rtol=1e-6)
