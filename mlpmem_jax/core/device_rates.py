"""The compute rate of one device of this process: published if its kind is known, else measured."""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp

from mlpmem_jax.core import chips

_SIZE = 1536  # rows and columns of the factors


def peak_rate(dtype: str) -> float:
    """The FLOP/s relative to which one device's utilization is reported, when it computes in `dtype`.

    The published bfloat16 peak if the device is known, else the measured rate of products in `dtype`.
    """
    rates = chips.published(jax.devices()[0].device_kind)
    return rates.flops if rates else matmul_rate(dtype)


@functools.cache
def matmul_rate(dtype: str, seconds: float = 0.5) -> float:
    """FLOP/s of a square matrix product on one device.

    Args:
      dtype: dtype of the factors, e.g. "float32"; the product is accumulated in float32.
      seconds: time for which the product is repeated; the fastest repetition counts.
    """
    key_a, key_b = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (_SIZE, _SIZE), dtype) for key in (key_a, key_b))
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    multiply(a, b).block_until_ready()
    best, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        multiply(a, b).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * _SIZE**3 / best
