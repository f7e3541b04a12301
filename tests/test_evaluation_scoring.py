"""Scores of the memory and the LM against a float64 softmax of their logits, on one device and on a mesh."""

import jax
import numpy as np
import pytest

from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.core.sharding import RULES, Sharding
from mlpmem_jax.models import gpt2, language_model, memory, scoring
from mlpmem_jax.planning import hlo

MEMORY = memory.MemoryConfig("gpt2", 37, 40, 12, 16, 2, 32)
LANGUAGE_MODEL = gpt2.GPT2Config(vocab_size=36, context_length=8, width=16, blocks=2, heads=2)


def log_softmax_oracle(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@jax.jit
def fresh_models(key):
    """Parameters of a memory and of a language model, far from uniform."""
    parameters = memory.init(MEMORY, key), gpt2.init(LANGUAGE_MODEL, key)
    return jax.tree.map(lambda array: array * 8.0, parameters)


@pytest.fixture(params=[(1, 1), (4, 2)], ids=["one device", "4x2"])
def sharding(request):
    fsdp, tensor = request.param
    if jax.device_count() < fsdp * tensor:
        pytest.skip(f"needs {fsdp * tensor} devices")
    return Sharding(make_mesh(1, fsdp, tensor, devices=jax.devices()[: fsdp * tensor]))


def test_memory_scores_are_its_softmax_at_the_next_token(sharding):
    parameters = fresh_models(jax.random.key(0))[0]
    generator = np.random.default_rng(0)
    inputs_NxD = generator.normal(size=(27, 12)).astype(np.float16)
    next_N = generator.integers(37, size=27).astype(np.int32)
    logits_NxV = np.asarray(memory.logits(parameters, MEMORY, inputs_NxD.astype(np.float32)))[:, :37]
    expected_NxV = log_softmax_oracle(logits_NxV)
    placed = jax.device_put(parameters, sharding.tree(memory.logical_axes(MEMORY)))
    for chunk in (8, 32, None):  # the last chunk short, one chunk longer than all, the default
        found_N = scoring.memory_log_probabilities(placed, MEMORY, inputs_NxD, next_N, sharding=sharding, chunk=chunk)
        np.testing.assert_allclose(found_N, expected_NxV[np.arange(27), next_N], rtol=1e-4, atol=1e-4)
    rows_NxV = scoring.memory_distributions(placed, MEMORY, inputs_NxD, sharding=sharding)
    np.testing.assert_allclose(rows_NxV, np.exp(expected_NxV), rtol=1e-3, atol=1e-6)


def test_language_model_scores_and_distributions_agree_with_its_logits(sharding):
    parameters = fresh_models(jax.random.key(0))[1]
    tokens_SxT = np.random.default_rng(1).integers(36, size=(5, 8)).astype(np.int32)
    next_SxT = np.roll(tokens_SxT, -1, axis=1)
    expected_SxTxV = log_softmax_oracle(language_model.logits(parameters, LANGUAGE_MODEL, tokens_SxT))
    placed = jax.device_put(parameters, sharding.tree(gpt2.logical_axes(LANGUAGE_MODEL)))
    found_SxT = scoring.language_model_log_probabilities(
        placed, LANGUAGE_MODEL, tokens_SxT, next_SxT, sharding=sharding, chunk=4
    )
    picked_SxT = np.take_along_axis(expected_SxTxV, next_SxT[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(found_SxT, picked_SxT, rtol=1e-4, atol=1e-4)
    hidden_SxTxD = scoring.language_model_hidden(placed, LANGUAGE_MODEL, tokens_SxT, sharding=sharding)
    rows_NxV = scoring.language_model_distributions(placed, hidden_SxTxD.reshape(40, -1)[3:8], sharding=sharding)
    np.testing.assert_allclose(rows_NxV, np.exp(expected_SxTxV.reshape(40, -1)[3:8]), rtol=1e-3, atol=1e-6)


def test_a_chunk_holds_no_more_than_the_limits():
    sharding = Sharding(make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    assert scoring.chunk_positions(50257, sharding) * 50257 <= scoring.LOGITS_AT_ONCE
    assert scoring.chunk_positions(scoring.LOGITS_AT_ONCE * 3, sharding) == 1
    assert scoring.chunk_positions(2, sharding) == scoring.POSITIONS_AT_ONCE


def test_few_positions_are_not_padded_to_a_whole_chunk(sharding, monkeypatch):
    parameters = fresh_models(jax.random.key(0))[0]
    shapes = []
    monkeypatch.setattr(scoring, "_on_mesh", lambda rows, *_: shapes.append(rows.shape) or rows)
    scoring.memory_log_probabilities(
        parameters, MEMORY, np.zeros((3, 12), np.float32), np.zeros(3, np.int32), sharding=sharding, chunk=1024
    )
    assert shapes[0] == (-(-3 // sharding.shards("batch")) * sharding.shards("batch"), 12)


def test_the_batch_is_sharded_as_the_config_says():
    """All four devices share the batch; six positions are no multiple of them."""
    rules = {**dict.fromkeys(RULES), "batch": ("slice", "fsdp", "tensor"), "embed": "fsdp"}
    sharding = Sharding(make_mesh(1, 2, 2, devices=jax.devices()[:4]), rules)
    memory_parameters, base = fresh_models(jax.random.key(0))
    memory_parameters = jax.device_put(memory_parameters, sharding.tree(memory.logical_axes(MEMORY)))
    base = jax.device_put(base, sharding.tree(gpt2.logical_axes(LANGUAGE_MODEL)))
    generator = np.random.default_rng(2)
    inputs_6xD = generator.normal(size=(6, 12)).astype(np.float32)
    tokens_6xT = generator.integers(36, size=(6, 8)).astype(np.int32)
    memory_6xV = log_softmax_oracle(np.asarray(memory.logits(memory_parameters, MEMORY, inputs_6xD))[:, :37])
    base_6xV = log_softmax_oracle(language_model.logits(base, LANGUAGE_MODEL, tokens_6xT))[:, -1]
    found_6 = scoring.memory_log_probabilities(
        memory_parameters, MEMORY, inputs_6xD, tokens_6xT[:, 0], sharding=sharding
    )
    np.testing.assert_allclose(found_6, memory_6xV[np.arange(6), tokens_6xT[:, 0]], rtol=1e-4, atol=1e-4)
    found_6xV = scoring.memory_distributions(memory_parameters, MEMORY, inputs_6xD, sharding=sharding)
    np.testing.assert_allclose(found_6xV, np.exp(memory_6xV), rtol=1e-3, atol=1e-6)
    next_6xT = np.roll(tokens_6xT, -1, axis=1)
    found_6xT = scoring.language_model_log_probabilities(base, LANGUAGE_MODEL, tokens_6xT, next_6xT, sharding=sharding)
    np.testing.assert_allclose(found_6xT[:, -1], base_6xV[np.arange(6), next_6xT[:, -1]], rtol=1e-4, atol=1e-4)
    hidden_6xTxD = scoring.language_model_hidden(base, LANGUAGE_MODEL, tokens_6xT, sharding=sharding)
    found_6xV = scoring.language_model_distributions(base, hidden_6xTxD[:, -1], sharding=sharding)
    np.testing.assert_allclose(found_6xV, np.exp(base_6xV), rtol=1e-3, atol=1e-6)
    assert scoring.chunk_positions(scoring.LOGITS_AT_ONCE, sharding) == 4


def test_scoring_a_sharded_language_model_moves_its_parameters_and_not_the_batch():
    """Collectives grow with the batch only by the scores, which every process gets."""
    sharding = Sharding(make_mesh(1, 4, 1, devices=jax.devices()[:4]))
    axes, abstract = gpt2.logical_axes(LANGUAGE_MODEL), language_model.abstract_parameters(LANGUAGE_MODEL)
    parameters = jax.tree.map(
        lambda array, placed: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=placed),
        abstract,
        sharding.tree(axes, abstract),
    )

    def sent(sequences: int) -> float:
        tokens = jax.ShapeDtypeStruct((sequences, 8), np.int32, sharding=sharding.rows(2))
        program = scoring._language_model_chunk.lower(
            parameters, tokens, tokens, config=LANGUAGE_MODEL, compute_dtype=np.dtype("float32"), sharding=sharding
        )
        return sum(collective.sent for collective in hlo.parse(program.compile().as_text()).collectives)

    assert 0 < sent(48) - sent(8) <= 40 * 8 * 4
