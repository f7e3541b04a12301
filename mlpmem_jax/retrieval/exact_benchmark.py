"""The exact search on one device, compared with its roofline."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mlpmem_jax.core import chips
from mlpmem_jax.core.benchmark_rows import row, seconds_by_round
from mlpmem_jax.core.device_rates import peak_rate
from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.retrieval import ring

_SIZES = (2_000_000, 1280, 1024), (2_500_000, 576, 64)  # keys, width, k: the paper's; configs/library_h100.py's
_SIZES_ON_CPU = ((4096, 32, 16),)
_ROUNDS = 5


def rows(config: ml_collections.ConfigDict) -> list[dict]:
    """Rows of (name, value, unit, detail). Sizes do not depend on the config."""
    del config
    return [_row(*sizes) for sizes in (_SIZES_ON_CPU if jax.default_backend() == "cpu" else _SIZES)]


def _row(keys: int, width: int, k: int) -> dict:
    """The minimum time for the matrix products, or for reading the keys, divided by the time that a search takes."""
    published = chips.published(jax.devices()[0].device_kind)
    peak = peak_rate("bfloat16")
    queries, dtype = ring.QUERIES_PER_DEVICE, jnp.bfloat16
    mesh = make_mesh(devices=jax.devices()[:1])
    search, (keys_NxD, norms_N, queries_QxD, excluded_Qx2) = ring.program(mesh, keys, queries, width, k)

    @jax.jit
    def draw(key):
        drawn_NxD = jax.random.normal(key, keys_NxD.shape, dtype)
        norms = ring.squared_norms(drawn_NxD)
        return drawn_NxD, jnp.where(jnp.arange(norms_N.shape[0]) < keys, norms, jnp.inf)

    drawn_NxD, norms = draw(jax.random.key(0))
    asked_QxD = drawn_NxD[:queries]
    own_Qx2 = jnp.arange(queries, dtype=jnp.int32)[:, None] + jnp.array([0, 1], jnp.int32)
    placed = [
        jax.device_put(array, shape.sharding)
        for array, shape in zip(
            (drawn_NxD, norms, asked_QxD, own_Qx2), (keys_NxD, norms_N, queries_QxD, excluded_Qx2), strict=True
        )
    ]
    seconds_R = seconds_by_round({"search": lambda: search(*placed)}, _ROUNDS)["search"]
    taken, products = float(np.median(seconds_R)), 2 * keys * queries * width / peak
    reading = 2 * keys * width / published.bandwidth if published else 0.0
    return row(
        f"exact search, {keys:,} keys of width {width}, k {k}",
        max(products, reading) / taken,
        "of the roofline",
        f"bfloat16, {queries} queries at once: {queries / taken:,.0f} queries/s, {1e3 * taken:.1f} ms; "
        f"products alone {1e3 * products:.1f} ms, reading the keys {1e3 * reading:.1f} ms; medians of {_ROUNDS}",
    )
