"""Exported folders in PyTorch and transformers against JAX: logits, loss, generation, and where the memory runs."""

import ast
import contextlib
import json
import pathlib

import numpy as np
import pytest
import torch
import transformers
from interop_data import GPT2, INPUT_BLOCK, MODELS, VOCABULARY, WEIGHT, WIDTH, write_workdir

from mlpmem_jax.core.artifacts import open_artifact
from mlpmem_jax.core.errors import UserError
from mlpmem_jax.corpus.tokens import encode_prompts
from mlpmem_jax.inference.decoding import DecoderConfig, Parameters, prepare
from mlpmem_jax.inference.generate import generate
from mlpmem_jax.interop import export_model, verification, weights_benchmark
from mlpmem_jax.models import memory

TOKENS = np.random.default_rng(3).integers(1, VOCABULARY, (2, 24))
PROMPTS = [[5, 9, 30], [44, 2, 17, 8, 51, 23, 3, 60], [12]]


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    """(what is in the working directory, the folder exported from it, the model loaded from that)."""
    root = tmp_path_factory.mktemp("export")
    workdir = write_workdir(root / "work", *MODELS[request.param], begin=request.param != "gpt2")
    folder = export_model.transformers_folder(workdir.config, str(root / "out"))
    return workdir, folder, load(folder)


@pytest.fixture(scope="module")
def projected(tmp_path_factory):
    root = tmp_path_factory.mktemp("projected")
    workdir = write_workdir(root / "work", *MODELS["gpt2-projected"])
    folder = export_model.transformers_folder(workdir.config, str(root / "out"))
    return workdir, folder, load(folder)


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@torch.no_grad()
@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_logits_are_the_log_mixture_of_jax(exported, weight):
    workdir, _, model = exported
    model.config.interpolation_weight = weight
    logits = model(torch.from_numpy(TOKENS)).logits.numpy()
    model.config.interpolation_weight = WEIGHT
    np.testing.assert_allclose(logits, workdir.log_mixture(TOKENS, weight), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("exported", ["gpt2", "llama-projected", "mistral"], indirect=True)
def test_64_greedy_tokens_are_those_of_jax_also_in_a_left_padded_batch(exported):
    """Llama's and Mistral's tokenizers put a token before a text here, GPT-2's does not."""
    workdir, folder, model = exported
    models, parameters = (
        DecoderConfig(workdir.base_model, workdir.model, INPUT_BLOCK),
        Parameters(workdir.base, workdir.memory, WEIGHT),
    )
    texts = [" ".join(f"w{token}" for token in prompt) for prompt in PROMPTS]
    tokens = open_artifact(f"{workdir.config.workdir}/tokens", "tokens")
    prompts = encode_prompts(tokens, texts)
    before = [] if workdir.base_model == GPT2 else [1]
    assert prompts == [before + prompt for prompt in PROMPTS]
    expected = generate(models, prepare(parameters), prompts, count=64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert batch["input_ids"][0].tolist() == [0] * 5 + prompts[0]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (*before, 0, 0)[:2]
    assert model.generation_config.bos_token_id == tokenizer.bos_token_id
    actual = model.generate(**batch, max_new_tokens=64, eos_token_id=None, do_sample=False)[:, len(prompts[1]) :]
    np.testing.assert_array_equal(actual, expected)
    logits = model(**tokenizer(texts[1:2], return_tensors="pt")).logits[0].numpy()
    np.testing.assert_allclose(logits, workdir.log_mixture(np.array(prompts[1:2]), WEIGHT)[0], rtol=0, atol=1e-4)


@torch.no_grad()
def test_loss_is_the_negative_log_mixture_of_the_labels(projected):
    workdir, _, model = projected
    labels = TOKENS.copy()
    labels[0, 5:9] = -100
    loss = float(model(torch.from_numpy(TOKENS), labels=torch.from_numpy(labels)).loss)
    log_BxTxV = workdir.log_mixture(TOKENS, WEIGHT)
    scores = [log_BxTxV[b, t, labels[b, t + 1]] for b in range(2) for t in range(23) if labels[b, t + 1] >= 0]
    assert loss == pytest.approx(-np.mean(scores), abs=1e-5)


@torch.no_grad()
def test_memory_runs_only_where_logits_are_asked_for_and_not_at_weight_zero(projected):
    _, _, model = projected
    tokens = torch.from_numpy(TOKENS)
    whole, runs = model(tokens).logits, []
    hook = model.memory.register_forward_pre_hook(lambda _, inputs: runs.append(tuple(inputs[0].shape[:2])))
    torch.testing.assert_close(model(tokens, logits_to_keep=1).logits, whole[:, -1:])
    positions = torch.tensor([3, 20])
    torch.testing.assert_close(model(tokens, logits_to_keep=positions).logits, whole[:, positions])
    model.generate(tokens, max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
    assert runs == [(2, 1), (2, 2), (2, 1), (2, 1), (2, 1)]
    model.config.interpolation_weight = 0.0
    torch.testing.assert_close(model(tokens).logits, model.base(tokens).logits.log_softmax(-1))
    model.config.interpolation_weight = WEIGHT
    assert len(runs) == 5
    hook.remove()


@torch.no_grad()
def test_cache_beams_and_sampling_follow_the_mixture(projected):
    workdir, _, model = projected
    prompt = torch.tensor([PROMPTS[1]])
    fixed = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    greedy = model.generate(prompt, **fixed, do_sample=False)
    torch.testing.assert_close(model.generate(prompt, **fixed, do_sample=False, use_cache=False), greedy)

    def score(tokens):
        log_1xTxV = workdir.log_mixture(np.asarray(tokens)[None], WEIGHT)
        return sum(log_1xTxV[0, at - 1, tokens[at]] for at in range(8, len(tokens)))

    beams = model.generate(prompt, **fixed, num_beams=4, return_dict_in_generate=True, output_scores=True)
    best = beams.sequences[0].tolist()
    assert float(beams.sequences_scores[0]) * 6 == pytest.approx(score(best), abs=1e-3)
    assert score(best) >= score(greedy[0].tolist()) - 1e-6

    torch.manual_seed(0)
    drawn = model.generate(prompt.repeat(4000, 1), **{**fixed, "max_new_tokens": 1}, do_sample=True, top_k=0)[:, -1]
    expected = np.exp(workdir.log_mixture(np.array([PROMPTS[1]]), WEIGHT)[0, -1])
    shares = np.bincount(drawn, minlength=VOCABULARY) / 4000
    assert np.abs(shares - expected).max() < 5 * np.sqrt(0.25 / 4000)


@torch.no_grad()
def test_auto_model_is_the_memory_alone(exported):
    workdir, folder, whole = exported
    alone, report = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert not [name for name in alone.state_dict() if name.startswith("base.")]
    inputs = np.random.default_rng(0).normal(size=(3, 5, WIDTH)).astype(np.float32)
    actual = alone(torch.from_numpy(inputs)).logits
    torch.testing.assert_close(actual, whole.memory(torch.from_numpy(inputs)).logits)
    expected = np.asarray(memory.logits(workdir.memory, workdir.model, inputs))[..., :VOCABULARY]
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-4)


def test_a_saved_model_loads_again(projected, tmp_path):
    _, _, model = projected
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    tokens = torch.from_numpy(TOKENS)
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits)


@torch.no_grad()
def test_shards_with_an_index_hold_the_same(projected, tmp_path):
    workdir, _, model = projected
    folder = export_model.transformers_folder(workdir.config, str(tmp_path / "out"), maximum_shard_bytes=20_000)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    sizes = [file.stat().st_size for file in folder.glob("model-*")]
    assert max(sizes) < 24_000
    tokens = torch.from_numpy(TOKENS)
    torch.testing.assert_close(load(folder)(tokens).logits, model(tokens).logits, rtol=0, atol=0)


def test_files_of_the_folder(projected):
    workdir, folder, model = projected
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "modeling_mlp_memory.py",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    (folder.parent / "umask").touch()
    assert {file.stat().st_mode for file in folder.iterdir()} == {(folder.parent / "umask").stat().st_mode}
    card = (folder / "README.md").read_text()
    assert "No perplexities were measured" in card
    assert workdir.config.workdir not in "".join((folder / name).read_text() for name in ("README.md", "config.json"))
    assert model.generation_config.eos_token_id == 0


def test_the_card_and_the_weight_are_those_of_the_report(projected, tmp_path):
    workdir, _, _ = projected
    folder = pathlib.Path(workdir.config.workdir)
    fingerprint = json.loads((folder / "memory" / "manifest.json").read_text())["fingerprint"]
    systems = {"base": 61.0, "memory": 43.5, "augmented": 42.25, "knn_lm": 40.0}
    metrics = {
        "perplexity": {"test": systems, "validation": systems},
        "interpolation_weight": {"memory": 0.6},
        "provenance": {"fingerprints": {"memory": fingerprint}},
    }
    (folder / "report").mkdir()
    (folder / "report" / "metrics.json").write_text(json.dumps(metrics))
    out = export_model.transformers_folder(workdir.config, str(tmp_path / "measured"))
    assert json.loads((out / "config.json").read_text())["interpolation_weight"] == 0.6
    assert "| base + memory | 42.25 | 42.25 |" in (out / "README.md").read_text()
    metrics["provenance"]["fingerprints"]["memory"] = "another"
    (folder / "report" / "metrics.json").write_text(json.dumps(metrics))
    out = export_model.transformers_folder(workdir.config, str(tmp_path / "stale"))
    assert json.loads((out / "config.json").read_text())["interpolation_weight"] == WEIGHT
    (folder / "report" / "metrics.json").unlink()


def test_the_modeling_file_needs_torch_and_transformers_alone():
    tree = ast.parse(pathlib.Path(export_model.__file__).with_name("modeling_mlp_memory.py").read_text())
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {name.name.split(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom):
            roots.add(node.module.split(".")[0])
    assert roots == {"math", "torch", "transformers"}


@pytest.mark.parametrize("output", [".", "new/folder"])
def test_an_empty_folder_is_filled_in_place(output, tmp_path, monkeypatch):
    """It may be the current one or a mounted volume, which cannot be replaced; a killed export leaves nothing."""
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(KeyboardInterrupt), export_model.output_folder(output) as folder:
        (folder / "half").write_text("")
        raise KeyboardInterrupt
    with export_model.output_folder(output) as folder:
        (folder / "config.json").write_text("{}")
    assert [file.name for file in (tmp_path / output).iterdir()] == ["config.json"]


def test_a_folder_with_something_in_it_is_left_alone(projected, tmp_path):
    workdir, _, _ = projected
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=f"{tmp_path.name}: is not empty"):
        export_model.transformers_folder(workdir.config, str(tmp_path))
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("exported", ["llama-projected"], indirect=True)
def test_fewer_bits_per_weight_change_perplexities_by_their_rounding(exported):
    """int8 has the weights that rounding each output channel to 255 steps gives; perplexities are those of NumPy."""
    workdir, folder, model = exported
    exact = model.memory.lm_head.weight.detach().double()
    rounded = weights_benchmark._with_weights(folder, "int8")
    scale = exact.abs().amax(1, keepdim=True) / 127.5
    assert (rounded.memory.lm_head.weight.dequantize().double() - exact).abs().le(scale + exact.abs() / 128).all()
    sizes = [weights_benchmark._bytes(kind.memory.lm_head.weight) for kind in (model, rounded)]
    assert exact.numel() < sizes[1] < sizes[0] / 2
    following = np.roll(TOKENS, -1, axis=1)
    expected = np.exp(-np.take_along_axis(workdir.log_mixture(TOKENS, WEIGHT), following[..., None], 2).mean())
    for tolerance, kind in ((1e-5, "float32"), (0.02, "bfloat16"), (0.05, "int8")):
        perplexity = verification.perplexities(weights_benchmark._with_weights(folder, kind), TOKENS, following)
        assert perplexity["augmented"] == pytest.approx(expected, rel=tolerance)
