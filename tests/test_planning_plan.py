"""`mlpmem plan`: the programs are the stages' own, costs follow from dimensions, advice comes in the stated order."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from etils import epath

from configs import mistral_7b, quickstart, wikitext103_gpt2_large, wikitext103_gpt2_small
from mlpmem_jax import cli
from mlpmem_jax.core.accelerators import resolve
from mlpmem_jax.core.errors import ConfigError, UserError
from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.interop import published
from mlpmem_jax.models import language_model
from mlpmem_jax.planning import (
    changes,
    compilation,
    cost,
    hlo,
    host_search,
    mesh_choice,
    plan,
    planned,
    programs,
    tables,
)
from mlpmem_jax.planning.roofline import Roofline
from mlpmem_jax.training import continued, data, train_benchmark

ROOT = pathlib.Path(__file__).parents[1]


def small_config():
    config = quickstart.get_config()
    config.base.context_length, config.base.width, config.base.heads = 16, 32, 2
    config.tokenizer.vocab_size = 512
    config.memory.width, config.memory.blocks = 64, 2
    config.training.batch_sequences, config.training.accumulation_steps = 16, 1
    config.training.optimizer, config.training.warmup_steps = "adamw", 1
    config.targets.keep, config.targets.k = 8, 8
    config.datastore.batch_sequences = 8
    return config


def test_the_planned_batch_is_the_one_that_training_reads(tmp_path):
    source = data.TargetSource(*train_benchmark._write_sample(epath.Path(tmp_path), 128, 16))
    batch = next(data.batches(source, 4, seed=0))
    width = batch["memory_inputs"].shape[-1]
    abstract = data.abstract_batch(
        4, 16, data.padded_entries(train_benchmark.ENTRIES), train_benchmark.VOCABULARY, (width, "float16")
    )
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        name: (array.shape, array.dtype) for name, array in abstract.items()
    }


@pytest.mark.parametrize("tensor", [1, 2])
def test_programs_of_the_stages_compile_and_do_the_flops_of_the_dimensions(tensor):
    config = small_config()
    config.mesh.tensor = tensor
    sharding = Sharding.of(config)
    for stage in ("train", "datastore"):
        for program in programs.build(config, stage, sharding, 100_000):
            text = program.function.lower(*program.arguments, **program.static).compile().as_text()
            actual = hlo.parse(text).flops * sharding.mesh.size
            # Attention computes all positions of a block, of which its formula counts half.
            assert actual == pytest.approx(program.flops, rel=0.2), program.name


def test_a_width_that_the_mesh_does_not_divide_is_an_error_of_the_config():
    config = small_config()
    config.memory.width, config.mesh.rules.embed = 60, "fsdp"
    with pytest.raises(ConfigError, match=r"config.mesh: fsdp makes 8 shards, which do not divide an axis of 60"):
        programs.build(config, "train", Sharding.of(config), 100_000)


def test_gradients_are_sharded_and_logits_are_not_gathered():
    config = small_config()
    config.mesh.tensor, config.training.batch_sequences = 2, 64  # logits are then larger than any parameter
    sharding = Sharding.of(config)
    step = programs.build(config, "train", sharding, 100_000)[0]
    read = hlo.parse(step.function.lower(*step.arguments).compile().as_text())
    positions = config.training.batch_sequences * config.base.context_length
    logits = positions // 4 * config.tokenizer.vocab_size // 2 * 4  # bytes of one device
    assert all(item.payload < logits for item in read.collectives if item.kind == "all-gather")
    assert any(item.kind == "reduce-scatter" for item in read.collectives)


def test_costs_of_the_papers_runs():
    large = wikitext103_gpt2_large.get_config()
    actual = {item.name: item for item in cost.artifacts(large, 100_000_000, 64)}
    # Keys of GPT-2 xl and inputs of GPT-2 large, 16 bits each; 774M parameters, and two checkpoints of three copies.
    held_out = 1 + large.corpus.validation_fraction + large.corpus.test_fraction
    assert actual["datastore"].storage == pytest.approx(100e6 * held_out * (2 * (1600 + 1280) + 8))
    assert actual["memory"].storage == pytest.approx(774e6 * 4 * 7, rel=0.01)
    # An index of ScaNN stands whole in each host (docs/neighbors.md); of an exact one each of 64 hosts holds its part.
    rows, width = large.targets.key_shard_rows, 1600
    for backend, of_key in (("auto", 5.5 * width + 96), ("exact", 4 * width / 64)):
        large.targets.backend, hosts = backend, []
        for large.targets.key_shard_rows in (rows, rows - 10**6):
            hosts += [item.host for item in cost.artifacts(large, 100_000_000, 64) if not item.is_kept]
        assert hosts[0] - hosts[1] == pytest.approx(10**6 * of_key)
    memory = mistral_7b.get_config()
    run = cost.estimate(memory, 5_000_000_000, "v5e:16x16", utilization=0.5)
    parameters = 8 * 3 * 4096 * 14336 + 4096 * 32768
    assert run.steps == memory.training.steps
    assert run.training_flops == pytest.approx(6 * parameters * run.steps * 512 * 128, rel=0.001)
    assert run.chip_hours > run.training_flops / 0.5 / 197e12 / 3600


@pytest.mark.parametrize(("mode", "vocab_size"), [("offline", 512), ("offline", 70_000), ("online", 512)])
def test_a_host_holds_the_batches_that_training_reads_ahead(mode, vocab_size):
    config = small_config()
    config.training.mode, config.tokenizer.vocab_size = mode, vocab_size
    config.training.evaluation_sequences, config.targets.k, config.targets.keep = 4, 1024, 0
    [memory] = [item for item in cost.artifacts(config, 100_000, 4) if item.name == "memory"]
    entry = (4 if vocab_size > 2**16 else 2) + 2  # a token id and a float16
    entries = min(vocab_size, 1024)
    position = entries * entry + 4 + (4 if mode == "online" else 2 * 32)
    batch = 16 // 4 * 16 * position  # four sequences of 16 positions for each of four hosts
    validated = 4 * 16 * (2 * 32 + 8)
    assert memory.host == (1 + data.read_ahead(batch)) * batch + validated


def test_the_validation_is_planned_in_the_precision_of_the_base_s_scores():
    config = small_config()
    config.datastore.compute_dtype = "bfloat16"
    _, validation = programs.build(config, "train", Sharding.of(config), 100_000)
    assert validation.static["compute_dtype"] == "bfloat16"


def test_storage_includes_what_is_deleted_when_the_targets_are_finished():
    config = wikitext103_gpt2_small.get_config()  # indices of the 1,600 numbers of GPT-2 xl's keys
    total = 117e6 * (1 + config.corpus.validation_fraction + config.corpus.test_fraction)
    indices, neighbors = 117e6 * (5 * 1600 + 4), total * 8 * 1024
    costs = cost.artifacts(config, 117_000_000, 16)
    by_name = {item.name: item.storage for item in costs}
    assert by_name["targets, while built"] == pytest.approx(indices + neighbors, rel=1e-4)
    kept, most = tables._storage(costs)
    assert kept == pytest.approx(sum(by_name.values()) - by_name["targets, while built"])
    before = by_name["tokens"] + by_name["base"] + by_name["datastore"]
    assert most == pytest.approx(before + indices + neighbors, rel=1e-4)
    # One shard of keys: nothing is stored between two, and the index stands beside the targets.
    config.targets.key_shard_rows = 117_000_000
    by_name = {item.name: item.storage for item in cost.artifacts(config, 117_000_000, 16)}
    assert by_name["targets, while built"] == pytest.approx(indices + by_name["targets"], rel=1e-4)
    run = cost.estimate(config, 117_000_000, "v5e:4x4")
    assert run.storage == pytest.approx(sum(by_name.values()) - by_name["targets, while built"])
    config = mistral_7b.get_config()  # no indices: 34.6 TB of neighbors for the training split alone
    by_name = {item.name: item.storage for item in cost.artifacts(config, 4_224_000_000, 64)}
    assert by_name["targets, while built"] == pytest.approx(4.224e9 * 1.002 * 8 * 1024, rel=1e-4)


def test_a_base_that_is_trained_on_needs_no_datastore():
    config = wikitext103_gpt2_large.get_config()
    config.training.epochs, config.datastore.key_model = 2.0, ""
    memory_config = cost.estimate(config, 100_000_000, "v5e:16x16", utilization=0.5)
    run = cost.estimate(config, 100_000_000, "v5e:16x16", utilization=0.5, arm="continued")
    sequence = language_model.forward_flops(published.dimensions(config.base.path), 1024) * 1024
    assert run.training_flops == pytest.approx(3 * sequence * run.steps * config.training.batch_sequences)
    searched = continued.steps_with_rate_search(run.steps) / run.steps  # the best rate for an imported base
    assert run.chip_hours == pytest.approx(searched * run.training_flops / 0.5 / 197e12 / 3600)
    tokens = 2 * 100e6 * (1 + config.corpus.validation_fraction + config.corpus.test_fraction)
    assert run.storage == pytest.approx(tokens + 774e6 * (4 + 4 + 24), rel=0.01)
    assert run.storage < memory_config.storage / 5


def test_the_price_of_a_run_holds_the_fine_tuning_of_its_base_and_the_choice_of_its_rate():
    config = wikitext103_gpt2_large.get_config()
    as_published = cost.estimate(config, 100_000_000, "v5e:16x16", utilization=0.5)
    config.base.finetune_steps = 800
    run = cost.estimate(config, 100_000_000, "v5e:16x16", utilization=0.5)
    sequence = language_model.forward_flops(published.dimensions(config.base.path), 1024) * 1024
    steps = 2 * 800 + 4 * 100  # two rates in full, and before that four for an eighth of the steps each
    more = 3 * sequence * steps * config.base.training.batch_sequences
    assert run.chip_hours - as_published.chip_hours == pytest.approx(more / 0.5 / 197e12 / 3600)


def test_the_search_is_planned_with_the_candidates_that_it_asks_for():
    config = small_config()
    config.targets.backend = "exact"
    for dimensions, candidates in ((0, 8), (4, 12)):
        config.targets.search_dimensions = dimensions
        [search] = programs.build(config, "neighbors", Sharding.of(config), 10_000)
        actual = jax.eval_shape(search.function, *search.arguments)
        assert {leaf.shape[-1] for leaf in jax.tree.leaves(actual) if leaf.ndim > 1} == {candidates}


@pytest.mark.parametrize("backend", ["auto", "scann"])
def test_a_search_on_the_hosts_is_priced_by_their_cores(backend, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(plan.compilation, "devices", lambda tpu, slices: jax.devices())
    config = wikitext103_gpt2_small.get_config()
    config.targets.backend = backend
    given = {"stage": "neighbors", "positions": 117_000_000, "json_file": f"{tmp_path / 'plan.json'}"}
    plan.run(config, "v5e:4x4", **given)
    actual = json.loads((tmp_path / "plan.json").read_text())
    assert actual["programs"] == []
    search = actual["host_search"]
    # 15 shards of 7.8 million keys of width 1,600: 27 of 2,793 leaves, 1,311 candidates.
    rows = 117_000_000 // 15
    seconds = 1600 * (27 * rows / 2793 * 42.5e-12 + 1311 * 1.17e-9)
    assert search["core_hours"] == pytest.approx(117e6 * 15 * seconds / 3600)
    assert search["chip_hours"] == pytest.approx(search["core_hours"] / (4 * 112) * 16)
    printed = capsys.readouterr().out
    assert "Memory of one chip" not in printed
    assert f"{search['core_hours']:,.0f} core-hours" in printed
    assert f"{search['chip_hours']:,.1f} held during the search" in printed
    assert "69.2 GiB of memory in each process, 553.9 GiB together" in printed  # docs/neighbors.md
    assert 8 * actual["gpu_node"]["memory_of_process"] / 2**30 == pytest.approx(553.9, abs=0.05)
    # A TPU's host has more CPUs, and a process for all of them.
    [at_once] = [item for item in actual["artifacts"] if not item["is_kept"]]
    assert at_once["host"] - actual["gpu_node"]["memory_of_process"] == (112 - 8) * 48 * 2**18
    # The overrides that it names are for the ring.
    for word in printed.partition("To search on the chips: ")[2].split("\n")[0].split():
        key, value = word.removeprefix("--config.").split("=")
        config.update_from_flattened_dict({key: float(value) if value[0] == "0" else value})
    assert host_search.plan(config, 117_000_000, resolve("v5e:4x4"), 1) is None
    [ring] = programs.build(config, "neighbors", Sharding.of(config), 100_000)
    assert ring.name == "exact search"


def test_dimensions_of_published_models(tmp_path):
    assert published.dimensions("openai-community/gpt2-xl").width == 1600
    with pytest.raises(UserError, match="a folder with its config"):
        published.dimensions("someone/unheard-of")
    values = {"model_type": "gpt2", "vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert published.dimensions(str(tmp_path)).blocks == 2


def test_changes_come_in_the_stated_order():
    config = small_config()
    config.training.loss_chunk = 512
    actual = list(changes.changes(config, "train"))
    assert actual[0] == {"training.remat": True}
    assert actual[1:3] == [{"training.remat": True, "training.loss_chunk": chunk} for chunk in (256, 128)]
    assert [item["training.accumulation_steps"] for item in actual[3:7]] == [2, 4, 8, 16]
    assert [item["mesh.tensor"] for item in actual[7:]] == [2, 4, 8, 16]


def test_the_smallest_change_is_the_first_that_compiles_less_what_is_not_needed(monkeypatch):
    tried = []

    def plan_stage(config, stage, tpu, devices, positions):
        tried.append((config.training.remat, config.training.loss_chunk, config.training.accumulation_steps))
        fits = config.training.accumulation_steps >= 4
        return [planned.Planned(None, {}, object() if fits else None, 0.0)]

    monkeypatch.setattr(changes, "plan_stage", plan_stage)
    config = small_config()
    config.training.loss_chunk = 256
    change = changes.smallest_change(config, "train", resolve("v5e:2x4"), [], 100_000)
    assert change == {"training.accumulation_steps": 4}
    assert tried[:4] == [(True, 256, 1), (True, 128, 1), (True, 128, 2), (True, 128, 4)]
    assert tried[4:] == [(False, 128, 4), (False, 256, 4)]  # then what is not needed is left out
    monkeypatch.setattr(changes, "plan_stage", lambda *_: [planned.Planned(None, {}, None, 0.0)])
    assert changes.smallest_change(config, "train", resolve("v5e:2x4"), [], 100_000) == {}


def test_the_fastest_mesh_is_named_and_the_others_say_what_is_wrong_with_them(monkeypatch, tmp_path, capsys):
    seconds = {2: 3.0, 4: 1.0}

    def plan_program(program, tpu, mesh):
        tensor = mesh.shape["tensor"]
        if tensor not in seconds:
            return planned.Planned(program, {}, None, 0.0, "20 GiB of 16")
        return planned.Planned(program, {"arguments": 2**30}, Roofline(1e-3, 1e-3, seconds[tensor], ()), 1.0)

    monkeypatch.setattr(mesh_choice, "plan_program", plan_program)
    monkeypatch.setattr(mesh_choice.compilation, "devices", lambda tpu, slices: jax.devices())
    config = small_config()
    config.training.batch_sequences = 4  # of 8 devices, which cannot share them with tensor = 1
    mesh_choice.run(config, "v5e:2x4", positions=100_000, json_file=f"{tmp_path / 'meshes.json'}")
    printed = capsys.readouterr().out
    assert "The fastest is --config.mesh.tensor=4\n" in printed
    actual = json.loads((tmp_path / "meshes.json").read_text())
    assert actual["fastest"] == 4
    assert [(item["tensor"], item["fsdp"], item["fits"]) for item in actual["meshes"]] == [
        (1, 8, False), (2, 4, True), (4, 2, True), (8, 1, False), (16, 0, False),
    ]  # fmt: skip
    reasons = [item.get("reason", "") for item in actual["meshes"]]
    assert "4 sequences, which 8 batch shards" in reasons[0]
    assert reasons[3] == "20 GiB of 16"
    assert "does not fit 8 devices" in reasons[4]
    monkeypatch.setattr(mesh_choice, "plan_program", lambda program, *_: planned.Planned(program, {}, None, 0.0))
    with pytest.raises(SystemExit):
        mesh_choice.run(config, "v5e:2x4", positions=100_000)


@pytest.mark.parametrize(
    ("installed", "attached", "expected"),
    [
        (["libtpu"], [], "cpu"),
        (["libtpu", "jax_cuda13_plugin"], [], "cuda,cpu"),
        (["libtpu"], ["/dev/accel0"], None),
        ([], [], None),
    ],
)
def test_stages_do_not_wait_for_a_tpu_that_is_not_there(monkeypatch, installed, attached, expected):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(cli.glob, "glob", lambda pattern: [path for path in attached if path.startswith(pattern[:8])])
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: name in installed or None)
    cli._leave_absent_tpus_alone("train")
    assert os.environ.get("JAX_PLATFORMS") == expected


def test_only_the_axis_slice_runs_between_tpu_slices():
    devices = compilation.devices(resolve("v5e:4x4"), 2)
    mesh = make_mesh(4, -1, 4, devices)  # cuts each TPU slice in two
    for part in mesh.devices:
        assert len({device.slice_index for device in part.flat}) == 1
    with pytest.raises(ConfigError, match=r"config.mesh.slice: 1 is not a multiple of the 2 TPU slices"):
        make_mesh(1, -1, 4, devices)


def test_a_real_compilation_for_tpus(tmp_path):
    command = [sys.executable, "-m", "mlpmem_jax.cli", "plan", "--quiet", "--config=configs/quickstart.py"]
    command += ["--topology=v5e:2x4", f"--json={tmp_path / 'plan.json'}", "--config.training.batch_sequences=32"]
    # Muon's own matrix products are none of the model's, and whole parameters need no gathering.
    command += ["--config.training.optimizer=adamw", "--config.mesh.rules.embed=fsdp"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Memory of one chip" in done.stdout
    actual = json.loads((tmp_path / "plan.json").read_text())
    step = actual["programs"][0]
    assert step["fits"]
    assert step["executed_flops_per_chip"] * 8 == pytest.approx(step["model_flops"], rel=0.35)
    assert {item["kind"] for item in step["collectives"]} & {"all-gather", "reduce-scatter"}
    assert 0 < step["utilization"] < 1
