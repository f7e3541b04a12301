"""The product of linear layers and its gradients, against the formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlpmem_jax.models.layers import product


@pytest.mark.parametrize(("inputs", "outputs"), [(5, 12), (12, 5)])
def test_gradients_of_a_product_are_those_of_the_formulas(inputs, outputs):
    random = np.random.default_rng(0)
    x_BxTxI, kernel_IxO = random.normal(size=(2, 7, inputs)), random.normal(size=(inputs, outputs))
    cotangent_BxTxO = random.normal(size=(2, 7, outputs))
    arguments = [jnp.asarray(array, jnp.float32) for array in (x_BxTxI, kernel_IxO)]
    result, pull_back = jax.vjp(product, *arguments)
    d_x_BxTxI, d_kernel_IxO = jax.jit(pull_back)(jnp.asarray(cotangent_BxTxO, jnp.float32))
    np.testing.assert_allclose(result, x_BxTxI @ kernel_IxO, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_x_BxTxI, cotangent_BxTxO @ kernel_IxO.T, rtol=1e-5, atol=1e-5)
    expected_IxO = np.einsum("bti,bto->io", x_BxTxI, cotangent_BxTxO)
    np.testing.assert_allclose(d_kernel_IxO, expected_IxO, rtol=1e-5, atol=1e-5)
