"""The reference's state dicts against memory classes written here from the paper's table of tensors, and importing."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from etils import epath
from interop_data import GPT2, MODELS, VOCABULARY, WEIGHT, WIDTH, config_for, write_base, write_tokens, write_workdir

from mlpmem_jax.core.errors import UserError
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.interop import export_model, import_model
from mlpmem_jax.models import memory, saved

nn = torch.nn

# The classes of the reference, from the table of their tensors: nothing here knows of the package.


class ReferenceNorm(nn.Module):
    def __init__(self, width, epsilon):
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.empty(width)), epsilon

    def forward(self, x):
        return self.weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.epsilon)


class ReferenceGPT2Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = nn.Module()
        self.mlp.c_fc = transformers.pytorch_utils.Conv1D(4 * config.n_embd, config.n_embd)
        self.mlp.c_proj = transformers.pytorch_utils.Conv1D(config.n_embd, 4 * config.n_embd)
        self.activation = transformers.activations.ACT2FN[config.activation_function]

    def forward(self, x):
        return x + self.mlp.c_proj(self.activation(self.mlp.c_fc(self.ln_1(x))))


class ReferenceLlamaBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = ReferenceNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = nn.Module()
        self.mlp.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.mlp.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.mlp.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = transformers.activations.ACT2FN[config.hidden_act]

    def forward(self, x):
        x_normed = self.input_layernorm(x)
        return x + self.mlp.down_proj(self.activation(self.mlp.gate_proj(x_normed)) * self.mlp.up_proj(x_normed))


class ReferenceMemory(nn.Module):
    def __init__(self, config, input_dim, output_dim):
        super().__init__()
        if input_dim != output_dim:
            self.embedding_transform = nn.Linear(input_dim, output_dim)
        if config.model_type == "gpt2":
            self.h = nn.ModuleList(ReferenceGPT2Block(config) for _ in range(config.n_layer))
            self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        else:
            self.layers = nn.ModuleList(ReferenceLlamaBlock(config) for _ in range(config.num_hidden_layers))
            self.norm = ReferenceNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, x):
        x = self.embedding_transform(x) if hasattr(self, "embedding_transform") else x
        for block in self.h if hasattr(self, "h") else self.layers:
            x = block(x)
        return self.lm_head(self.ln_f(x) if hasattr(self, "ln_f") else self.norm(x))


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("reference")
    workdir = write_workdir(root / "work", *MODELS[request.param])
    return workdir, export_model.reference_folder(workdir.config, str(root / "out")), request.param


def empty_workdir(folder, base=None, **overrides):
    """A working directory that has tokens, and maybe a base."""
    write_tokens(epath.Path(folder))
    if base is not None:
        write_base(epath.Path(folder), base)
    return config_for(folder, **overrides)


def same_bytes(left, right):
    names = sorted(file.name for file in left.iterdir())
    assert names == sorted(file.name for file in right.iterdir())
    for name in names:
        assert (left / name).read_bytes() == (right / name).read_bytes(), name


@torch.no_grad()
def test_the_reference_classes_load_it_strictly_and_agree(exported):
    workdir, folder, name = exported
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.model_type == name.split("-")[0]
    values = json.loads((folder / "config.json").read_text())
    module = ReferenceMemory(config, values["input_dim"], values["output_dim"])
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    module.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, strict=True)
    inputs = np.random.default_rng(1).normal(size=(5, WIDTH)).astype(np.float32)
    expected = memory.logits(workdir.memory, workdir.model, inputs)[:, :VOCABULARY]
    np.testing.assert_allclose(module(torch.from_numpy(inputs)).numpy(), expected, rtol=0, atol=1e-4)


def test_reference_import_gives_the_same_parameters_and_exports_the_same_bytes(exported, tmp_path):
    workdir, folder, _ = exported
    config = empty_workdir(tmp_path / "work", workdir.base_model)
    artifact = import_model.run(config, str(folder))
    actual, model, _ = saved.load_memory(artifact.path, Sharding.of(config))
    assert model == workdir.model
    jax.tree.map(np.testing.assert_array_equal, actual, workdir.memory)
    assert artifact.summary["validation"]["interpolation_weight"] == 0.25
    same_bytes(folder, export_model.reference_folder(config, str(tmp_path / "again")))


def test_transformers_import_gives_base_and_memory_and_exports_the_same_bytes(exported, tmp_path):
    workdir, _, _ = exported
    folder = export_model.transformers_folder(workdir.config, str(tmp_path / "out"), maximum_shard_bytes=30_000)
    config = empty_workdir(tmp_path / "work")
    artifact = import_model.run(config, str(folder))
    base, model, _ = saved.load_language_model(epath.Path(config.workdir) / "base", Sharding.of(config))
    assert model == workdir.base_model
    jax.tree.map(np.testing.assert_array_equal, base, workdir.base)
    jax.tree.map(
        np.testing.assert_array_equal, saved.load_memory(artifact.path, Sharding.of(config))[0], workdir.memory
    )
    assert artifact.summary["validation"]["interpolation_weight"] == WEIGHT
    again = export_model.transformers_folder(config, str(tmp_path / "again"), maximum_shard_bytes=30_000)
    same_bytes(folder, again)
    assert import_model.run(config, str(folder)).fingerprint == artifact.fingerprint


def test_pickled_weights_are_read_as_weights_alone(tmp_path):
    workdir = write_workdir(tmp_path / "work", *MODELS["gpt2-projected"])
    folder = export_model.reference_folder(workdir.config, str(tmp_path / "out"))
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    config = empty_workdir(tmp_path / "again", GPT2)
    actual, _, _ = saved.load_memory(import_model.run(config, str(folder)).path, Sharding.of(config))
    jax.tree.map(np.testing.assert_array_equal, actual, workdir.memory)

    class Attack:
        def __reduce__(self):
            return (epath.Path(tmp_path / "attacked").write_text, ("done",))

    torch.save({"lm_head.weight": Attack()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: expected a state dict of tensors alone"):
        import_model.run(empty_workdir(tmp_path / "third", GPT2), str(folder))
    assert not (tmp_path / "attacked").exists()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Both formats of one memory."""
    root = tmp_path_factory.mktemp("bad")
    workdir = write_workdir(root / "work", *MODELS["gpt2-projected"])
    reference = export_model.reference_folder(workdir.config, str(root / "reference"))
    return {
        "reference": reference,
        "transformers": export_model.transformers_folder(workdir.config, str(root / "both")),
    }


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, *shape):
    return lambda tensors: tensors.update({name: np.zeros(shape, np.float32)})


@pytest.mark.parametrize(
    ("form", "change", "named"),
    [
        ("reference", drop("h.1.mlp.c_fc.bias"), r"tensor 'h\.1\.mlp\.c_fc\.bias' of shape \(96,\) is missing"),
        ("reference", put("h.2.ln_1.bias", 24), r"tensor 'h\.2\.ln_1\.bias' is not part of the model"),
        ("reference", put("h.0.mlp.c_fc.weight", 96, 24), r"'h\.0\.mlp\.c_fc\.weight' is \(96, 24\); config"),
        ("reference", put("embedding_transform.weight", 24, 17), r"'embedding_transform\.weight' is \(24, 17\)"),
        ("transformers", drop("memory.ln_f.weight"), r"tensor 'memory\.ln_f\.weight' of shape \(24,\) is missing"),
        ("transformers", drop("base.transformer.ln_f.bias"), r"tensor 'ln_f\.bias' of shape \(16,\) is missing"),
        ("transformers", put("other.weight", 3), r"tensor 'other\.weight' belongs to neither base nor memory"),
    ],
)
def test_a_wrong_tensor_is_named(folders, tmp_path, form, change, named):
    folder = shutil.copytree(folders[form], tmp_path / "bad")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    config = empty_workdir(tmp_path / "work", None if form == "transformers" else GPT2)
    with pytest.raises(UserError, match=named):
        import_model.run(config, str(folder))
    assert not (tmp_path / "work" / "memory").exists()


@pytest.mark.parametrize(
    ("form", "changes", "named"),
    [
        ("reference", {"vocab_size": 60}, "memory has a vocabulary of 60, the base of 61"),
        ("reference", {"model_type": "bert"}, "model_type is 'bert'"),
        ("reference", {"activation_function": "mish"}, "activation_function is 'mish'"),
        ("reference", {"n_layer": None}, "n_layer is None"),
        ("transformers", {"input_block": 2}, "reads block 2: set it to 1"),
        ("transformers", {"memory_config": None}, "memory_config"),
    ],
)
def test_an_unsuitable_config_is_refused(folders, tmp_path, form, changes, named):
    folder = shutil.copytree(folders[form], tmp_path / "bad")
    values = {**json.loads((folder / "config.json").read_text()), **changes}
    kept = {key: value for key, value in values.items() if value is not None or key == "n_layer"}
    (folder / "config.json").write_text(json.dumps(kept))
    with pytest.raises(UserError, match=named):
        import_model.run(empty_workdir(tmp_path / "work", GPT2), str(folder))


def test_truncated_weights_another_tokenizer_and_an_empty_folder_are_refused(folders, tmp_path):
    folder = shutil.copytree(folders["transformers"], tmp_path / "bad")
    config = empty_workdir(tmp_path / "work")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: expected weights in safetensors.*truncated"):
        import_model.run(config, str(folder))
    file.write_bytes(whole)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["w60"], tokenizer["model"]["vocab"]["w59"] = 59, 60
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=r"is not the tokenizer of .* --config\.tokenizer\.source=file"):
        import_model.run(config, str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json: expected the config"):
        import_model.run(config, str(tmp_path / "empty"))


def test_what_is_there_is_not_overwritten(folders, tmp_path):
    config = empty_workdir(tmp_path / "work")
    write_base(tmp_path / "work", seed=5)
    with pytest.raises(UserError, match=r"base: was made by another config"):
        import_model.run(config, str(folders["transformers"]))


def test_reference_has_no_gpt2_memory_of_another_feed_forward_width(tmp_path):
    narrow = memory.MemoryConfig("gpt2", VOCABULARY, 128, WIDTH, WIDTH, 1, 3 * WIDTH)
    workdir = write_workdir(tmp_path / "work", GPT2, narrow)
    with pytest.raises(UserError, match=r"48 wide; the reference's GPT-2 memory has 4 x 16"):
        export_model.reference_folder(workdir.config, str(tmp_path / "out"))
