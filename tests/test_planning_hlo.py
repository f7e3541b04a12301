"""Reading compiled programs: small ones compiled here for eight devices, and lines as TPU compilers write them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlpmem_jax.planning import hlo

ROWS, WIDTH, LAYERS = 64, 32, 5


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.asarray(jax.devices()).reshape(2, 4), ("fsdp", "tensor"))


def compiled(function, mesh, *shapes_and_specs):
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape, spec in shapes_and_specs
    ]
    return hlo.parse(jax.jit(function).lower(*arguments).compile().as_text())


@pytest.mark.parametrize(
    ("left", "right", "result", "attributes", "flops"),
    [
        # Scores of 8 x 25 heads: both batch axes are windows over a dilated input.
        (
            "bf16[8,25,128,64]", "bf16[8,25,896,64]", "f32[8,25,128,896]",
            "window={size=8x25 stride=7x24 lhs_dilate=8x25}, dim_labels=01bf_01oi->01bf",
            2 * 8 * 25 * 128 * 896 * 64,
        ),
        (
            "bf16[8,25,128,64]", "bf16[8,25,64,896]", "bf16[8,25,128,896]",
            "window={size=8x25 stride=8x25 pad=7_7x24_24 lhs_dilate=7x24 rhs_reversal=1x1}, dim_labels=01bf_01io->01bf",
            2 * 8 * 25 * 128 * 896 * 64,
        ),
        # A projection into 3 x 25 heads: they are a window of which all but one element meet padding.
        (
            "bf16[8,1024,1600,1,1]", "bf16[1600,3,25,64,1]", "bf16[8,1024,3,25,64]",
            "window={size=1x3x25 pad=0_0x2_2x24_24 rhs_reversal=0x1x1}, dim_labels=0bf12_i12o0->0b12f",
            2 * 8 * 1024 * 3 * 25 * 64 * 1600,
        ),
        # Heads summed: each element of the window meets one of the input.
        (
            "bf16[8,1024,64,25]", "bf16[25,64,1600,1]", "bf16[8,1024,1600,1]",
            "window={size=1x25}, dim_labels=0bf1_1io0->0bf1", 2 * 8 * 1024 * 1600 * 25 * 64,
        ),
    ],
)  # fmt: skip
def test_products_that_tpus_hold_as_convolutions_count_once(left, right, result, attributes, flops):
    text = f"""HloModule products

ENTRY %main (p.1: {left}, p.2: {right}) -> {result} {{
  %p.1 = {left} parameter(0)
  %p.2 = {right} parameter(1)
  ROOT %convolution.1 = {result} convolution(%p.1, %p.2), {attributes}
}}
"""
    assert hlo.parse(text).flops == flops


def test_a_scanned_body_counts_as_often_as_it_runs(mesh):
    def layers(x_NxD, kernels_LxDxD):
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x_NxD, kernels_LxDxD)[0]

    program = compiled(
        layers,
        mesh,
        ((ROWS, WIDTH), PartitionSpec(("fsdp", "tensor"))),
        ((LAYERS, WIDTH, WIDTH), PartitionSpec(None, ("fsdp", "tensor"))),
    )
    assert program.flops == 2 * (ROWS // 8) * WIDTH * WIDTH * LAYERS
    gathers = [operation for operation in program.collectives if operation.kind == "all-gather"]
    # The compiler may gather every layer by itself in the loop, or all of them before it: the bytes are the same.
    assert sum(operation.payload * operation.times for operation in gathers) == LAYERS * WIDTH * WIDTH * 4
    assert sum(operation.sent * operation.times for operation in gathers) == LAYERS * WIDTH * WIDTH * 4 * 7 / 8
    assert all(operation.group == tuple(range(8)) for operation in gathers)


@pytest.mark.parametrize(
    ("kind", "call", "result", "payload", "sent"),
    [
        ("all-reduce", lambda x: jax.lax.psum(x, "tensor"), PartitionSpec("fsdp"), 4096, 2 * 4096 * 3 / 4),
        (
            "reduce-scatter",
            lambda x: jax.lax.psum_scatter(x, "tensor", tiled=True),
            PartitionSpec(("fsdp", "tensor")),
            4096,
            4096 * 3 / 4,
        ),
        (
            "all-to-all",
            lambda x: jax.lax.all_to_all(x, "tensor", 0, 0, tiled=True),
            PartitionSpec("fsdp"),
            4096,
            4096 * 3 / 4,
        ),
        (
            "collective-permute",
            lambda x: jax.lax.ppermute(x, "tensor", [(0, 1), (1, 2), (2, 3), (3, 0)]),
            PartitionSpec("fsdp"),
            4096,
            4096,
        ),
    ],
)
def test_collectives_and_their_bytes(mesh, kind, call, result, payload, sent):
    mapped = jax.shard_map(call, mesh=mesh, in_specs=PartitionSpec("fsdp"), out_specs=result, check_vma=False)
    program = compiled(mapped, mesh, ((64, 32), PartitionSpec("fsdp")))  # 32 x 32 float32 on each device
    (actual,) = program.collectives
    assert (actual.kind, actual.payload, actual.sent, actual.times) == (kind, payload, sent, 1)
    expected = (0, 1) if kind == "collective-permute" else (0, 1, 2, 3)
    assert actual.group == expected


def test_matrix_products_of_batches(mesh):
    program = compiled(
        functools.partial(jnp.einsum, "bij,bjk->bik"),
        mesh,
        ((8, 16, 32), PartitionSpec(("fsdp", "tensor"))),
        ((8, 32, 64), PartitionSpec(("fsdp", "tensor"))),
    )
    assert program.flops == 2 * 16 * 32 * 64


TPU = """\
HloModule jit_step, is_scheduled=true

%all-reduce-scatter.1 (input.7: bf16[4096,512]) -> bf16[32,512] {
  %input.7 = bf16[4096,512]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.25 = bf16[4096,512]{1,0:T(8,128)(2,1)} all-reduce(%input.7), channel_id=13, replica_groups=GROUPS
  %constant.1 = u32[] constant(0)
  ROOT %dynamic-slice.82 = bf16[32,512]{1,0} dynamic-slice(%all-reduce.25, %constant.1, %constant.1)
}

%start (p.1: bf16[16,512]) -> (bf16[16,512], bf16[4096,512], u32[]) {
  %p.1 = bf16[16,512]{1,0} parameter(0)
  %all-gather.65 = bf16[4096,512]{1,0} all-gather(%p.1), channel_id=21, replica_groups=[1,256]<=[256], dimensions={0}
  ROOT %custom-call.12 = (bf16[16,512], bf16[4096,512], u32[]) custom-call(%all-gather.65), \
custom_call_target="AsyncCollectiveStart"
}

%product (p.2: bf16[64,4096], p.3: bf16[4096,512], p.4: bf16[16,512]) -> f32[64,512] {
  %p.2 = bf16[64,4096]{1,0} parameter(0)
  %p.3 = bf16[4096,512]{1,0} parameter(1)
  %p.4 = bf16[16,512]{1,0} parameter(2)
  %all-gather.67 = bf16[4096,512]{1,0} all-gather(%p.4), channel_id=21, replica_groups=[1,256]<=[256], dimensions={0}
  ROOT %convolution.57 = f32[64,512]{1,0:T(8,128)} convolution(%p.2, %p.3), dim_labels=bf_io->bf
}

%body (carry: (s32[], bf16[16,512], bf16[64,4096])) -> (s32[], bf16[16,512], bf16[64,4096]) {
  %carry = (s32[], bf16[16,512]{1,0}, /*index=2*/bf16[64,4096]{1,0}) parameter(0)
  %shard = bf16[16,512]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%carry), index=1
  %x = bf16[64,4096]{1,0} get-tuple-element(%carry), index=2
  %begun = (bf16[16,512], bf16[4096,512], u32[]) fusion(%shard), kind=kCustom, calls=%start
  %whole = bf16[4096,512]{1,0:S(1)} get-tuple-element(%begun), index=1
  %fusion.1 = f32[64,512]{1,0:T(8,128)} fusion(%x, %whole, %shard), kind=kOutput, calls=%product
  %gradient = bf16[4096,512]{1,0} custom-call(%fusion.1), custom_call_target="Pretend"
  %fusion.2 = bf16[32,512]{1,0} fusion(%gradient), kind=kCustom, calls=%all-reduce-scatter.1, \
backend_config={"collective_algorithm_config":{"debug":"StrategyRing{colors:1 phases:1}"}}
  ROOT %next = (s32[], bf16[16,512], bf16[64,4096]) tuple(%carry, %shard, %x)
}

%condition (carry.1: (s32[], bf16[16,512], bf16[64,4096])) -> pred[] {
  %carry.1 = (s32[], bf16[16,512]{1,0}, bf16[64,4096]{1,0}) parameter(0)
  %constant.277 = s32[]{:T(128)} constant(8)
  %counter = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  ROOT %lt.55 = pred[]{:T(512)} compare(%counter, %constant.277), direction=LT
}

ENTRY %main (a: bf16[16,512], b: bf16[64,4096]) -> bf16[16,512] {
  %a = bf16[16,512]{1,0} parameter(0)
  %b = bf16[64,4096]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %first = (s32[], bf16[16,512], bf16[64,4096]) tuple(%zero, %a, %b)
  %while.26 = (s32[], bf16[16,512], bf16[64,4096]) while(%first), condition=%condition, body=%body
  ROOT %out = bf16[16,512]{1,0} get-tuple-element(%while.26), index=1
}
"""


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("{{0,2,4,6},{1,3,5,7}}", (0, 2, 4, 6)),
        ("[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, use_global_device_ids=true", (0, 1, 2, 3)),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", (0, 4)),
        ("mesh['axis_0'=1,'axis_1'=2,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_2'}, use_global", (0, 2, 4, 6)),
    ],
)
def test_programs_of_tpus(groups, first):
    program = hlo.parse(TPU.replace("GROUPS", groups))
    gather, scatter = program.collectives  # one gather, though two fusions name it
    assert (gather.kind, gather.payload, gather.times) == ("all-gather", 4096 * 512 * 2, 8)
    assert gather.group == tuple(range(256))
    assert (scatter.kind, scatter.rings) == ("reduce-scatter", 1)
    assert scatter.group == first
    assert scatter.sent == 4096 * 512 * 2 * (len(first) - 1) / len(first)
    (loop,) = program.steps
    starts, runs = ([len(step.starts) for step in loop.body], [step.operation is not None for step in loop.body])
    ends = [step.ends for step in loop.body]
    # Started before the product, waited for behind it; the other starts and ends in one place.
    assert (loop.trips, starts, runs) == (8, [1, 0, 0, 1], [False, True, True, False])
    assert ends[:3] == [(), ("21",), ()]
    assert len(ends[3]) == 1
    assert program.flops == 8 * 2 * 64 * 4096 * 512
    product = next(operation for operation in program.operations if operation.name == "fusion.1")
    assert product.traffic == 64 * 4096 * 2 + 64 * 512 * 4  # the gathered kernel is in the chip's own memory


ACROSS_A_LOOP = """HloModule across, is_scheduled=true

%start (p.1: f32[4096,512]) -> (f32[4096,512], f32[4096,512], u32[]) {
  %p.1 = f32[4096,512]{1,0} parameter(0)
  %all-reduce.1 = f32[4096,512]{1,0} all-reduce(%p.1), channel_id=9, replica_groups=[1,8]<=[8]
  ROOT %custom-call.1 = (f32[4096,512], f32[4096,512], u32[]) custom-call(%p.1, %all-reduce.1), \
custom_call_target="AsyncCollectiveStart"
}

%product (p.2: f32[4096,512], p.3: f32[4096,512], p.4: bf16[64,4096], p.5: bf16[4096,256]) -> (f32[64,256], \
f32[4096,512], f32[4096,512]) {
  %p.2 = f32[4096,512]{1,0} parameter(0)
  %p.3 = f32[4096,512]{1,0} parameter(1)
  %p.4 = bf16[64,4096]{1,0} parameter(2)
  %p.5 = bf16[4096,256]{1,0} parameter(3)
  %all-reduce.2 = f32[4096,512]{1,0} all-reduce(%p.2), channel_id=9, replica_groups=[1,8]<=[8]
  %convolution.1 = f32[64,256]{1,0} convolution(%p.4, %p.5), dim_labels=bf_io->bf
  ROOT %tuple.1 = (f32[64,256]{1,0}, f32[4096,512]{1,0}, f32[4096,512]{1,0}) tuple(%convolution.1, %all-reduce.2, %p.3)
}

%end (p.6: f32[4096,512], p.7: f32[4096,512]) -> f32[4096,512] {
  %p.6 = f32[4096,512]{1,0} parameter(0)
  %p.7 = f32[4096,512]{1,0} parameter(1)
  ROOT %all-reduce.3 = f32[4096,512]{1,0} all-reduce(%p.6), channel_id=9, replica_groups=[1,8]<=[8]
}

%body (carry: (s32[], f32[4096,512], f32[4096,512], bf16[64,4096], bf16[4096,256])) -> (s32[]) {
  %carry = (s32[], f32[4096,512], f32[4096,512], bf16[64,4096], bf16[4096,256]) parameter(0)
  %from = f32[4096,512]{1,0} get-tuple-element(%carry), index=1
  %to = f32[4096,512]{1,0} get-tuple-element(%carry), index=2
  %x = bf16[64,4096]{1,0} get-tuple-element(%carry), index=3
  %kernel = bf16[4096,256]{1,0} get-tuple-element(%carry), index=4
  %beside = (f32[64,256]{1,0}, f32[4096,512]{1,0}, f32[4096,512]{1,0}) fusion(%from, %to, %x, %kernel), \
kind=kOutput, calls=%product
  %other = f32[4096,512]{1,0} all-reduce(%from), channel_id=10, replica_groups=[1,8]<=[8]
  ROOT %next = (s32[]) tuple(%carry)
}

%condition (carry.1: (s32[])) -> pred[] {
  %carry.1 = (s32[]) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (a: f32[4096,512]) -> f32[4096,512] {
  %a = f32[4096,512]{1,0} parameter(0)
  %begun = (f32[4096,512], f32[4096,512], u32[]) fusion(%a), kind=kCustom, calls=%start
  %half = f32[4096,512]{1,0} get-tuple-element(%begun), index=1
  %loop = (s32[]) while(%begun), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"6"}}
  ROOT %done = f32[4096,512]{1,0} fusion(%a, %half), kind=kCustom, calls=%end
}
"""


def test_a_collective_that_continues_through_a_loop_is_one():
    program = hlo.parse(ACROSS_A_LOOP)
    assert [(operation.payload, operation.times) for operation in program.collectives] == [(2**23, 1), (2**23, 6)]
    begun, loop, done = program.steps
    assert [channel for channel, _ in begun.starts] == ["9"]
    assert (begun.ends, done.ends) == ((), ("9",))
    assert [len(step.starts) for step in loop.body] == [0, 1]  # the other one is of the body itself
    (product,) = program.operations
    assert product.traffic == 64 * 4096 * 2 + 4096 * 256 * 2 + 64 * 256 * 4  # not what is summed beside it


SPARSE_CORE = """HloModule offloaded, is_scheduled=true

%gather (p.1: bf16[16,512]) -> bf16[256,512] {
  %p.1 = bf16[16,512]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[256,512]{1,0} all-gather(%p.1), channel_id=1, replica_groups=[16,16]<=[256], dimensions={0}
}, execution_thread="sparsecore"

%offloaded (p.2: bf16[16,512]) -> bf16[256,512] {
  %p.2 = bf16[16,512]{1,0} parameter(0)
  ROOT %custom-call.1 = bf16[256,512]{1,0} custom-call(%p.2), called_computations={%gather}
}, execution_thread="sparsecore"

ENTRY %main (a: bf16[16,512]) -> bf16[256,512] {
  %a = bf16[16,512]{1,0} parameter(0)
  %begun = ((), (), (s32[8])) async-start(), async_execution_thread="sparsecore", calls=%offloaded
  %before = bf16[16,512]{1,0} negate(%a)
  %under-way = ((bf16[16,512]{1,0}), bf16[256,512]{1,0}, (s32[8])) async-update(%begun, %before)
  %beside = bf16[16,512]{1,0} negate(%a)
  ROOT %done = bf16[256,512]{1,0} async-done(%under-way)
}
"""


def test_a_sparse_cores_collective_starts_with_its_operands():
    program = hlo.parse(SPARSE_CORE)
    (gather,) = program.collectives
    assert (gather.kind, gather.payload, gather.group) == ("all-gather", 256 * 512 * 2, tuple(range(16)))
    names = [step.operation and step.operation.name for step in program.steps]
    assert names == ["before", None, "beside", None]
    assert [len(step.starts) for step in program.steps] == [0, 1, 0, 0]
    assert program.steps[3].ends == (program.steps[1].starts[0][0],)


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule nothing\n")
    with pytest.raises(ValueError, match="trip count"):
        hlo.parse(TPU.replace("constant(8)", "add(%counter, %counter)"))
    with pytest.raises(ValueError, match="unknown form"):
        hlo.parse(TPU.replace("GROUPS", "@group"))
