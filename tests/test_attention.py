"""Attention in chunks of queries against the equation, written without chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlpmem_jax.models import transformer


def brute_force(query, key, value, window):
    """softmax(q k / sqrt K) v in float64, a query at a time."""
    mixed = np.zeros(query.shape)
    repeats = query.shape[1] // key.shape[1]
    for b, h, t in np.ndindex(query.shape[:3]):
        seen = slice(max(0, t + 1 - window) if window else 0, t + 1)
        scores = key[b, h // repeats, seen] @ query[b, h, t] / np.sqrt(query.shape[-1])
        weights = np.exp(scores - scores.max())
        mixed[b, h, t] = weights / weights.sum() @ value[b, h // repeats, seen]
    return mixed


@pytest.mark.parametrize(
    ("length", "window"), [(5, 0), (128, 0), (300, 0), (300, 70), (300, 128), (300, 299), (300, 1)]
)
def test_causal_attention_is_the_equation(length, window):
    random = np.random.default_rng(length + window)
    query, key, value = (random.standard_normal((2, heads, length, 8)) for heads in (4, 2, 2))
    actual = transformer.causal_attention(*(jnp.asarray(x, jnp.float32) for x in (query, key, value)), window)
    np.testing.assert_allclose(actual, brute_force(query, key, value, window), atol=2e-6)


def test_no_gradient_comes_from_positions_that_are_not_seen():
    length, window, position = 300, 140, 200
    query, key, value = (jax.random.normal(jax.random.key(i), (1, 1, length, 8)) for i in range(3))

    def of_one(key, value):
        return transformer.causal_attention(query, key, value, window)[0, 0, position].sum()

    for gradient in jax.grad(of_one, argnums=(0, 1))(key, value):
        seen = np.flatnonzero(np.abs(gradient[0, 0]).sum(-1))
        np.testing.assert_array_equal(seen, np.arange(position + 1 - window, position + 1))
