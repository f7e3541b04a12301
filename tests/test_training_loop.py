"""The train loop: the same losses on every mesh, exact resumption, clean stops."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import re
import signal
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from mlpmem_jax.core import stage_costs
from mlpmem_jax.core.errors import ConfigError, Stopped, UserError
from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.core.sharding import RULES, Sharding
from mlpmem_jax.models import memory
from mlpmem_jax.models.interpolation import perplexity
from mlpmem_jax.training import data, goodput, loop, state
from mlpmem_jax.training.loss import sparse_cross_entropy

LENGTH, WIDTH, VOCABULARY, ENTRIES = 8, 16, 50, 4
MODEL = memory.MemoryConfig(
    family="gpt2",
    vocab_size=VOCABULARY,
    padded_vocab_size=64,
    input_width=WIDTH,
    width=32,
    blocks=2,
    feed_forward_width=64,
)


class Source:
    """Sequences whose next token is a function of the input, so that there is something to learn."""

    def __init__(self, count=64):
        random = np.random.default_rng(0)
        self.inputs = random.normal(size=(count, LENGTH, WIDTH)).astype(np.float16)
        self.ids = (self.inputs.argmax(-1)[..., None] * 3 + np.arange(ENTRIES)).astype(np.int32)
        weights = random.random((count, LENGTH, ENTRIES)).astype(np.float32)
        self.probabilities = weights / weights.sum(-1, keepdims=True)

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, sequences_S):
        return {
            "memory_inputs": self.inputs[sequences_S],
            "token_ids": self.ids[sequences_S],
            "probabilities": self.probabilities[sequences_S],
            "next_tokens": self.ids[sequences_S, :, 0],
        }


def loss_of(sharding, parameters, frozen, batch):
    hidden = memory.hidden(parameters, MODEL, batch["memory_inputs"].reshape(-1, WIDTH).astype(jnp.float32))
    return sparse_cross_entropy(
        hidden,
        memory.output_kernel(parameters),
        batch["token_ids"].reshape(-1, ENTRIES),
        batch["probabilities"].reshape(-1, ENTRIES),
        batch["next_tokens"].reshape(-1),
        alpha=0.5,
        vocab_size=VOCABULARY,
        chunk=16,
        sharding=sharding,
    )


def task(**changes):
    settings = default.optimization()
    settings.update(
        {"steps": 20, "batch_sequences": 16, "warmup_steps": 4, "evaluate_every": 10, "checkpoint_every": 10} | changes
    )
    return loop.TrainingTask(
        settings=settings,
        initialize=functools.partial(memory.init, MODEL, jax.random.key(0)),
        abstract_parameters=jax.eval_shape(functools.partial(memory.init, MODEL), jax.random.key(0)),
        logical_axes=memory.logical_axes(MODEL),
        loss=loss_of,
        positions_per_sequence=LENGTH,
        flops_per_position=1.0,
    )


def fit(folder, mesh, *, task, source=None, validate=lambda parameters: {"perplexity": 1.0}, rules=RULES):
    run = loop.Run("memory", str(folder), source or Source(), validate)
    return loop.fit(task, run, Sharding(mesh, rules))


def recorded_losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.parametrize("optimizer", [pytest.param("muon", marks=pytest.mark.slow), "adamw"])
def test_meshes_agree_over_twenty_steps(tmp_path, monkeypatch, optimizer):
    monkeypatch.setattr(loop, "_LOG_EVERY", 1)
    shapes = {"one": (1, 1, 1), "2x4": (1, 2, 4), "8x1": (1, 8, 1), "2x2x2": (2, 2, 2)}
    losses = {}
    for name, shape in shapes.items():
        mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
        rate = 0.02 if optimizer == "muon" else 0.003
        fit(tmp_path / name, mesh, task=task(optimizer=optimizer, learning_rate=rate))
        losses[name] = np.array(list(recorded_losses(tmp_path / name).values()))
    assert len(losses["one"]) == 20
    assert losses["one"][-1] < 0.9 * losses["one"][0]
    for name in shapes:
        np.testing.assert_allclose(losses[name], losses["one"], rtol=1e-4, err_msg=name)


WHOLE = {**RULES, "embed": None, "mlp": None, "vocab": None}  # every device holds all parameters


@pytest.mark.parametrize("optimizer", [pytest.param("muon", marks=pytest.mark.slow), "adamw"])
def test_devices_that_hold_all_parameters_agree_with_one(tmp_path, monkeypatch, optimizer):
    monkeypatch.setattr(loop, "_LOG_EVERY", 1)
    losses = []
    for shape in ((1, 1, 1), (1, 2, 1), (2, 2, 2)):  # the two layers are divided between two devices, not between four
        mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
        folder, rate = tmp_path / str(mesh.size), 0.02 if optimizer == "muon" else 0.003
        steps = 4 if mesh.size < 8 else 2
        training = task(optimizer=optimizer, learning_rate=rate, accumulation_steps=steps)
        fit(folder, mesh, task=training, rules=WHOLE)
        losses.append(list(recorded_losses(folder).values()))
    assert len(losses[0]) == 20
    assert losses[0][-1] < 0.9 * losses[0][0]
    for measured in losses[1:]:
        np.testing.assert_allclose(measured, losses[0], rtol=1e-4)


def compiled_step(devices, **changes):
    mesh = make_mesh(1, devices, 1, devices=jax.devices()[:devices])
    sharding = Sharding(mesh, WHOLE)
    program = loop.step_program(task(**changes), sharding, 20)
    items = [Source()[index] for index in range(16)]
    batch = sharding.global_batch(jax.tree.map(lambda *rows: np.stack(rows), *items))
    return program.step.lower(program.abstract_state, {}, batch).compile().as_text()


def test_devices_that_hold_all_parameters_sum_gradients_once_a_step():
    once, accumulated = (
        [line for line in compiled_step(2, optimizer="adamw", accumulation_steps=steps).splitlines()
         if re.search(r" all-(reduce|gather|to-all)(-start)?\(", line)]
        for steps in (1, 4)
    )  # fmt: skip
    assert 0 < len(accumulated) <= len(once)
    assert not [line for line in accumulated if "while/body" in line]


def test_newton_schulz_is_shared_by_layers():
    gram_matrices = "f32[2,32,32]"  # of both layers, which one device computes alone
    assert gram_matrices in compiled_step(1, optimizer="muon")
    assert gram_matrices not in compiled_step(2, optimizer="muon")


def test_accumulation_changes_nothing(tmp_path):
    mesh = make_mesh(1, 2, 1, devices=jax.devices()[:2])
    whole, _ = fit(tmp_path / "a", mesh, task=task())
    parts, _ = fit(tmp_path / "b", mesh, task=task(accumulation_steps=4))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), whole, parts)


class Terminating(Source):
    """Sends a signal to the process while the seventh batch is read."""

    def __init__(self, signum):
        super().__init__()
        self.signum = signum
        self.reads = itertools.count(1)  # several threads read

    def __getitem__(self, sequences_S):
        if next(self.reads) == 7:
            os.kill(os.getpid(), self.signum)
        return super().__getitem__(sequences_S)


def interrupted(folder, first_mesh, second_mesh, signum=signal.SIGTERM):
    """A run that is stopped on one mesh and resumed on another."""
    with pytest.raises(Stopped, match=r"preempted; wrote a checkpoint at step \d+"):
        fit(folder, first_mesh, task=task(), source=Terminating(signum))
    return fit(folder, second_mesh, task=task())


def test_a_preempted_run_resumes_to_the_very_same_parameters(tmp_path):
    """SIGTERM in the middle: a checkpoint, a clear message, and the rerun ends bit for bit where one run ends."""
    mesh = make_mesh(1, 2, 2, devices=jax.devices()[:4])
    whole, summary = fit(tmp_path / "whole", mesh, task=task())
    parts, summary_again = interrupted(tmp_path / "parts", mesh, mesh)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    assert summary == summary_again
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_a_preempted_run_resumes_on_another_mesh(tmp_path):
    first = make_mesh(1, 4, 1, devices=jax.devices()[:4])
    second = make_mesh(1, 2, 4)
    whole, _ = fit(tmp_path / "whole", first, task=task())
    parts, _ = interrupted(tmp_path / "parts", first, second, signal.SIGINT)
    assert jax.tree.leaves(parts)[0].sharding.mesh.shape == second.shape
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), whole, parts)


def test_a_run_that_is_preempted_in_its_last_validation_stops_too(tmp_path):
    """And not the next training, or stage, of the same command hours later."""
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])

    def validate(parameters):
        if not (tmp_path / "asked").exists():
            (tmp_path / "asked").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return {"perplexity": 1.0}

    settings = task(steps=3, warmup_steps=0, evaluate_every=5)
    with pytest.raises(Stopped, match="preempted after its last step, 3; run again"):
        fit(tmp_path / "run", mesh, task=settings, validate=validate)
    _, summary = fit(tmp_path / "run", mesh, task=settings, validate=validate)
    assert summary["step"] == 3


def test_progress_advances_by_the_step(tmp_path, monkeypatch):
    """Steps of a large model on a CPU take seconds, so it cannot wait for the records of every 20th."""
    advances = []

    @contextlib.contextmanager
    def progress(total, description, unit, initial):
        yield types.SimpleNamespace(advance=lambda amount, note: advances.append(amount))

    monkeypatch.setattr(loop, "progress", progress)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    fit(tmp_path, mesh, task=task(steps=23, evaluate_every=50, checkpoint_every=50))
    assert sum(advances) == 23
    assert len(advances) > 15
    assert max(advances) <= 1 + loop._AHEAD


def test_a_second_training_of_a_stage_does_not_count_the_first(tmp_path):
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    settings = task(steps=2, warmup_steps=0)
    with stage_costs.measured(str(tmp_path), "controls"):
        fit(tmp_path / "first", mesh, task=settings, validate=lambda parameters: time.sleep(2) or {"perplexity": 1.0})
        began = time.time()
        fit(tmp_path / "second", mesh, task=settings)
        wall = time.time() - began
    lines = [json.loads(line) for line in (tmp_path / "second" / "metrics.jsonl").read_text().splitlines()]
    assert goodput.summary(lines)["wall"] <= wall + 0.1


def test_the_first_ctrl_c_asks_and_the_second_ends_at_once():
    before = signal.getsignal(signal.SIGINT)
    with loop._stop_requests() as must_stop:
        assert not must_stop(1)
        signal.raise_signal(signal.SIGINT)
        assert must_stop(2)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before


def test_what_a_training_starts_from_is_not_held(tmp_path):
    """A base of 29 GB whose output projection a memory starts from would take its place beside the state."""
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    shape, settings = (7, 11, 13), task(steps=1, warmup_steps=0, optimizer="adamw")
    training = dataclasses.replace(settings, initialize=lambda given: memory.init(MODEL, jax.random.key(given.size)))
    held = []

    def validate(parameters):
        held.append(any(array.shape == shape for array in jax.live_arrays()))
        return {"perplexity": 1.0}

    run = loop.Run("memory", str(tmp_path), Source(), validate, start=lambda: (jnp.zeros(shape),))
    loop.fit(training, run, Sharding(mesh, RULES))
    assert held == [False]


def test_the_best_validation_is_kept(tmp_path, monkeypatch):
    """Validation is best at step 10 of 20: those parameters come back, not the last, which are freed before."""
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    seen = []
    restore, others = state.Checkpoints.restore, sum(array.nbytes for array in jax.live_arrays())

    def restore_alone(self, step, abstract):
        held = sum(array.nbytes for array in jax.live_arrays()) - others
        assert held < sum(array.size for array in jax.tree.leaves(abstract["parameters"]))
        return restore(self, step, abstract)

    monkeypatch.setattr(state.Checkpoints, "restore", restore_alone)

    def validate(parameters):
        seen.append(jax.tree.map(np.array, parameters))
        return {"perplexity": 5.0 if len(seen) == 2 else 7.0}

    kept, summary = fit(tmp_path, mesh, task=task(evaluate_every=5), validate=validate)
    assert summary["step"] == 10
    assert summary["validation"] == {"perplexity": 5.0}
    jax.tree.map(np.testing.assert_array_equal, kept, seen[1])


def test_a_loss_that_is_no_number_stops_with_the_step_named(tmp_path):
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])

    class Poisoned(Source):
        def __getitem__(self, sequences_S):
            batch = dict(super().__getitem__(sequences_S))
            batch["memory_inputs"][sequences_S == 0] = np.nan
            return batch

    source = Poisoned()
    assert len(source) == 64  # four batches of 16 an epoch: sequence 0 is in one of the first four steps
    with pytest.raises(UserError, match=r"the loss is nan at step [1-4];"):
        fit(tmp_path, mesh, task=task(), source=source)


@jax.custom_vjp
def finite_with_a_gradient_of_nan(x):
    return x


finite_with_a_gradient_of_nan.defvjp(lambda x: (x, None), lambda _, gradient: (gradient * jnp.nan,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "gradient"}, r"the gradient norm is nan at step 1; the last good checkpoint is at step 0"),
        ({"learning_rate": 1e39, "schedule": "constant"}, r"the parameters are not finite at step 1; .* at step 0"),
        ({"validate": lambda _: {"perplexity": perplexity(np.array([-1.0, np.nan]))}}, r"1 of 2 are NaN\) at step 1;"),
    ],
)
def test_what_is_not_finite_is_never_saved(tmp_path, changes, message):
    """Each of these with a finite loss: a checkpoint of it would be the latest, to be resumed from or kept as best."""
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    changes = dict(changes)
    poison, others = changes.pop("loss", None), {"validate": changes.pop("validate")} if "validate" in changes else {}
    training = task(steps=1, warmup_steps=0, optimizer="adamw", **changes)
    if poison:

        def poisoned(*arguments):
            loss, statistics = loss_of(*arguments)
            return finite_with_a_gradient_of_nan(loss), statistics

        training = dataclasses.replace(training, loss=poisoned)
    with pytest.raises(UserError, match=message):
        fit(tmp_path, mesh, task=training, **others)
    assert state.Checkpoints(tmp_path).latest_step() is None


class Numbers:
    def __len__(self):
        return 7

    def __getitem__(self, sequences_S):
        return {"number": sequences_S}


@pytest.mark.parametrize(("batch", "parts"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2)])
def test_the_order_is_that_of_one_process_that_takes_one_at_a_time(batch, parts):
    one = data.batches(Numbers(), 1, seed=3)
    order = [int(next(one)["number"][0]) for _ in range(20)]
    assert sorted(order[:7]) == sorted(order[7:14]) == list(range(7))
    iterators = [data.batches(Numbers(), batch, 3, part, parts) for part in range(parts)]
    for start in range(0, 20, batch):
        taken = [next(iterator)["number"] for iterator in iterators]
        assert np.stack(taken, axis=1).ravel().tolist() == order[start : start + batch]


def test_batches_that_do_not_divide_and_splits_that_are_too_small_are_refused():
    mesh = make_mesh(1, 8, 1)
    settings = default.optimization()
    settings.batch_sequences = 12
    with pytest.raises(ConfigError, match=r"config.training.batch_sequences: 12 .* 8 batch shards"):
        loop.check_batch(settings, Sharding(mesh), "training")
    with pytest.raises(ConfigError, match="the training split has only 11"):
        loop.total_steps(settings, 11)
    with pytest.raises(ConfigError, match=r"1.0 epochs of \d+ sequences amount to 2\*\*31 steps or more"):
        loop.total_steps(settings, 10**12)
