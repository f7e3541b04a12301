"""Counted operations and parameters against the paper's formulas, XLA's own count and the real trees."""

import functools

import jax
import jax.extend
import numpy as np
import pytest

from mlpmem_jax.models import flops, gpt2, language_model, llama, memory

BASE = gpt2.GPT2Config(vocab_size=120, context_length=32, width=24, blocks=1, heads=2)
GPT2_MEMORY = memory.MemoryConfig("gpt2", 120, 128, 24, 24, 1, 96)
LLAMA_MEMORY = memory.MemoryConfig("llama", 120, 128, 40, 24, 1, 72)


def size(init, config):
    shapes = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    return sum(array.size for array in jax.tree.leaves(shapes))


def test_parameter_counts_are_those_of_the_trees():
    assert gpt2.parameter_count(BASE) == size(gpt2.init, BASE)
    assert gpt2.parameter_count(BASE, embeddings=False) == size(gpt2.init, BASE) - (120 + 32) * 24
    for config in (GPT2_MEMORY, LLAMA_MEMORY):
        assert flops.memory_parameters(config) == size(memory.init, config)
        assert flops.memory_parameters(config, output_projection=False) == size(memory.init, config) - 24 * 128


@pytest.mark.parametrize(
    ("width", "blocks", "heads", "expected"),
    [
        (768, 12, 12, 124_439_808),
        (1024, 24, 16, 354_823_168),
        (1280, 36, 20, 774_030_080),
        (1600, 48, 25, 1_557_611_200),
    ],
)
def test_published_sizes_of_gpt2(width, blocks, heads, expected):
    assert gpt2.parameter_count(gpt2.GPT2Config(50257, 1024, width, blocks, heads)) == expected


def test_operations_without_output_projection_are_the_papers_formulas():
    layers, width, context = 12, 768, 1024
    config = gpt2.GPT2Config(50257, context, width, layers, 12)
    expected = 4 * layers * width * (2 * width + 4 * width) + 2 * layers * context * width
    assert gpt2.forward_flops(config, context, output_projection=False) == expected
    config = memory.MemoryConfig("llama", 32000, 32000, 4096, 4096, 8, 11008)
    assert flops.memory_forward(config, output_projection=False) == 6 * 8 * 4096 * 11008


def operations_of_products(function, *arguments):
    """2 m n k summed over the matrix products of the traced program, blocks of a scan counted once."""
    total = 0

    def visit(jaxpr):
        nonlocal total
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                left, output = equation.invars[0].aval, equation.outvars[0].aval
                total += 2 * output.size * int(np.prod([left.shape[axis] for axis in contracted]))
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                visit(inner)

    visit(jax.make_jaxpr(function)(*arguments).jaxpr)
    return total


@pytest.mark.parametrize("tied", [False, True])
def test_llama_counts_are_those_of_its_parameters_and_traced_matrix_products(tied):
    config = llama.LlamaConfig(120, 32, 24, 1, 4, 2, 8, 40, tied=tied)
    assert language_model.parameter_count(config) == size(llama.init, config)
    without = language_model.parameter_count(config, embeddings=False)
    assert size(llama.init, config) - without == (1 if tied else 2) * 120 * 24
    tokens = np.zeros((1, 32), np.int32)
    parameters = llama.init(config, jax.random.key(0))
    traced = operations_of_products(lambda p: language_model.logits(p, config, tokens), parameters)
    masked_half = 2 * 32 * (4 * 8) * 32
    assert traced == 32 * language_model.forward_flops(config, 32) + masked_half


def test_a_sliding_window_counts_the_positions_that_it_sees():
    wide = llama.LlamaConfig(120, 64, 24, 2, 4, 2, 8, 40)
    narrow = llama.LlamaConfig(120, 64, 24, 2, 4, 2, 8, 40, sliding_window=16)
    seen = sum(min(t + 0.5, 16) for t in range(64)) / 64  # half of itself, as without a window: length / 2 in the mean
    difference = 4 * 2 * (4 * 8) * (64 / 2 - seen)
    assert llama.forward_flops(wide, 64) - llama.forward_flops(narrow, 64) == pytest.approx(difference, rel=0.02)


def test_published_sizes_of_llama_and_mistral():
    assert llama.parameter_count(llama.LlamaConfig(32000, 4096, 4096, 32, 32, 32, 128, 11008)) == 6_738_415_616
    assert llama.parameter_count(llama.LlamaConfig(32768, 32768, 4096, 32, 32, 8, 128, 14336)) == 7_248_023_552


def test_operations_are_those_of_the_traced_matrix_products():
    tokens = np.zeros((1, 32), np.int32)
    parameters = gpt2.init(BASE, jax.random.key(0))
    traced = operations_of_products(lambda p: language_model.logits(p, BASE, tokens), parameters)
    # The program multiplies whole [T, T] blocks of attention; the count takes the causal half.
    masked_half = 2 * 32 * BASE.width * BASE.blocks * 32
    assert traced == 32 * gpt2.forward_flops(BASE, 32) + masked_half
    for config in (GPT2_MEMORY, LLAMA_MEMORY):
        inputs = np.zeros((5, config.input_width), np.float32)
        parameters = memory.init(config, jax.random.key(0))
        traced = operations_of_products(lambda p, c=config, x=inputs: memory.logits(p, c, x), parameters)
        assert traced == 5 * flops.memory_forward(config)
