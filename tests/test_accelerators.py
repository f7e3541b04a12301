"""Names of TPU slices against rows copied by hand from Google Cloud's pages on each generation."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpmem_jax.core import accelerators
from mlpmem_jax.core.errors import UserError

# accelerator type, topology, chips, virtual machines, machine type
DOCUMENTED = [
    ("v4-8", "2x2x1", 4, 1, "ct4p-hightpu-4t"),
    ("v4-32", "2x2x4", 16, 4, "ct4p-hightpu-4t"),
    ("v4-128", "4x4x4", 64, 16, "ct4p-hightpu-4t"),
    ("v4-4096", "8x16x16", 2048, 512, "ct4p-hightpu-4t"),
    ("v5litepod-1", "1x1", 1, 1, "ct5lp-hightpu-1t"),
    ("v5litepod-4", "2x2", 4, 1, "ct5lp-hightpu-4t"),
    ("v5litepod-8", "2x4", 8, 1, "ct5lp-hightpu-8t"),
    ("v5litepod-16", "4x4", 16, 4, "ct5lp-hightpu-4t"),
    ("v5litepod-256", "16x16", 256, 64, "ct5lp-hightpu-4t"),
    ("v5p-8", "2x2x1", 4, 1, "ct5p-hightpu-4t"),
    ("v5p-16", "2x2x2", 8, 2, "ct5p-hightpu-4t"),
    ("v5p-64", "2x4x4", 32, 8, "ct5p-hightpu-4t"),
    ("v5p-128", "4x4x4", 64, 16, "ct5p-hightpu-4t"),
    ("v5p-256", "4x4x8", 128, 32, "ct5p-hightpu-4t"),
    ("v5p-512", "4x8x8", 256, 64, "ct5p-hightpu-4t"),
    ("v5p-1024", "8x8x8", 512, 128, "ct5p-hightpu-4t"),
    ("v5p-2048", "8x8x16", 1024, 256, "ct5p-hightpu-4t"),
    ("v5p-4096", "8x16x16", 2048, 512, "ct5p-hightpu-4t"),
    ("v5p-8192", "16x16x16", 4096, 1024, "ct5p-hightpu-4t"),
    ("v5p-12288", "16x16x24", 6144, 1536, "ct5p-hightpu-4t"),
    ("v6e-1", "1x1", 1, 1, "ct6e-standard-1t"),
    ("v6e-4", "2x2", 4, 1, "ct6e-standard-4t"),
    ("v6e-8", "2x4", 8, 1, "ct6e-standard-8t"),
    ("v6e-32", "4x8", 32, 8, "ct6e-standard-4t"),
    ("v6e-128", "8x16", 128, 32, "ct6e-standard-4t"),
    ("v6e-256", "16x16", 256, 64, "ct6e-standard-4t"),
]


@pytest.mark.parametrize(("name", "topology", "chips", "hosts", "machine_type"), DOCUMENTED)
def test_names_resolve_to_the_documented_slices(name, topology, chips, hosts, machine_type):
    actual = accelerators.resolve(name)
    assert (actual.topology, actual.chips, actual.hosts, actual.machine_type) == (topology, chips, hosts, machine_type)
    assert actual.chips_per_host * hosts == chips
    assert actual.accelerator_type == name
    assert actual.has_default_topology


def test_every_machine_has_a_number_of_cpus():
    for generation in accelerators.GENERATIONS.values():
        assert generation.cpus.keys() == generation.machine_types.keys()
    assert accelerators.resolve("v5e:4x4").cpus_per_host == 112
    assert accelerators.resolve("v5e:2x4").cpus_per_host == 224


def test_generation_and_topology_name_the_same_slice():
    assert accelerators.resolve("v5e:16x16") == accelerators.resolve("v5e-256") == accelerators.resolve("v5litepod-256")
    long = accelerators.resolve("v5p:4x4x16")
    assert (long.chips, long.accelerator_type, long.has_default_topology) == (256, "v5p-512", False)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("v5p-100", ["v5p-64 (2x4x4: 32 chips, 8 hosts)", "v5p-128 (4x4x4: 64 chips, 16 hosts)"]),
        ("v5p-9", ["v5p-8 ", "v5p-16 "]),
        ("v5e:3x4", ["v5litepod-8 ", "v5litepod-16 "]),
        ("v5litepod-512", ["v5litepod-256 "]),
        ("v6e-2", ["v6e-1 (1x1: 1 chip, 1 host)", "v6e-4 "]),
        ("v6e-0", ["v6e-1 "]),
        ("v4-8200", ["v4-8192 "]),
        ("v5p:8x4x4", ["v5p-256 (4x4x8: 128 chips, 32 hosts)"]),
        ("v5-256", ["v5p-256", "v5e-256"]),
        ("v3-8", ["v4-8"]),
        ("h100-8", ["launch.slurm"]),
        ("v5p", ["v5p:4x4x8", "v5p-8"]),
    ],
)
def test_impossible_names_are_refused_with_the_nearest(name, nearest):
    with pytest.raises(UserError, match=f"--accelerator={name}: ") as caught:
        accelerators.resolve(name)
    assert any(text in str(caught.value) for text in nearest)
    if nearest[0].startswith("v") and name != "v5p":
        assert all(text in str(caught.value) for text in nearest)


@settings(deadline=None)
@given(st.data())
def test_every_slice_is_whole_hosts_and_found_by_its_own_names(data):
    family = data.draw(st.sampled_from(sorted(accelerators.GENERATIONS)))
    generation = accelerators.GENERATIONS[family]
    drawn = data.draw(st.sampled_from(accelerators.slices(generation)))
    assert drawn.hosts * drawn.chips_per_host == drawn.chips
    assert drawn.chips_per_host in generation.machine_types
    assert accelerators.resolve(f"{family}:{drawn.topology}") == drawn
    by_type = accelerators.resolve(drawn.accelerator_type)
    assert by_type.chips == drawn.chips
    assert sum(by_type.shape) <= sum(drawn.shape)
    if drawn.chips > 64 and generation.max_chips:
        assert all(side % 4 == 0 for side in drawn.shape)
        assert list(drawn.shape) == sorted(drawn.shape)
        assert drawn.chips <= generation.max_chips
