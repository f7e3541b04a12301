"""Random configs, damaged artifacts, checkpoints and corpora: one clear error or the right result, and never a hang.

Every test prints its seed; MLPMEM_FUZZ_SEED=SEED repeats it.
"""

import bz2
import contextlib
import functools
import gzip
import hashlib
import io
import json
import lzma
import os
import pathlib
import random
import secrets
import signal
import string

import jax
import ml_collections
import numpy as np
import optax
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from workdirs import small_config

from configs import default, llama2_7b, mistral_7b, quickstart, smoke, wikitext103_gpt2_large, wikitext103_gpt2_small
from mlpmem_jax import stages
from mlpmem_jax.core import config_files, preflight
from mlpmem_jax.core.artifacts import open_artifact
from mlpmem_jax.core.config import SCHEMA, as_config_file, check_config, value_of
from mlpmem_jax.core.errors import UserError
from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.corpus import files, tokens
from mlpmem_jax.corpus.documents import SPLITS
from mlpmem_jax.models import saved
from mlpmem_jax.training.state import Checkpoints, initial_state

pytestmark = pytest.mark.slow

CONFIGS, DAMAGES, CORPORA = 1000, 2000, 300
SECONDS = 10
READY = [default, smoke, quickstart, wikitext103_gpt2_small, wikitext103_gpt2_large, mistral_7b, llama2_7b]


@pytest.fixture
def generator(request, capsys):
    seed = int(os.environ.get("MLPMEM_FUZZ_SEED") or secrets.randbits(32))
    with capsys.disabled():
        print(f"\n{request.node.name}: MLPMEM_FUZZ_SEED={seed}")
    return random.Random(seed)


@contextlib.contextmanager
def answers(what: str):
    """What is inside ends in time, by itself or with an error that a user can act on."""

    def late(signum, frame):
        raise AssertionError(f"{what}: no answer within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    except UserError:
        pass
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def leaves(schema=SCHEMA, prefix=""):
    for name, rule in schema.items():
        if isinstance(rule, dict):
            yield from leaves(rule, f"{prefix}{name}.")
        else:
            yield prefix + name


LEAVES = list(leaves())
NUMBERS = [0, 1, -1, 2, 7, 64, 1000, 2**31 - 1, 2**31, 2**63, 2**64, -(2**70), 10**400]
FRACTIONS = [0.0, -0.0, 0.5, 1.0, 1.5, -1e-9, 1e-40, 1e308, float("nan"), float("inf"), -float("inf")]
TEXTS = [
    "",
    " ",
    "x",
    "~/x",
    "~nobody/x",
    "a,b",
    "gs://",
    "s3://b/x",
    "ftp://x",
    "/",
    "..",
    "%s",
    "{}",
    "\\",
    "é\ud83d",
    "(",
    "#",
]
TEXTS += [
    "train",
    "hub",
    "files",
    "gguf",
    "file",
    "huggingface",
    "openai-community/gpt2",
    "exact",
    "scann",
    "adamw",
    "x" * 5000,
]


def any_value(generator: random.Random):
    return generator.choice(
        [
            lambda: generator.choice(NUMBERS),
            lambda: generator.choice(FRACTIONS),
            lambda: generator.choice(TEXTS),
            lambda: generator.choice([True, False, None, [], (1, 2), {"a": 1}, b"x"]),
            lambda: generator.randrange(-5, 5000),
            lambda: "".join(generator.choices(string.printable, k=generator.randrange(12))),
        ]
    )()


def likely_value(generator: random.Random, value):
    """One of the right type, often near the given one: contradictions lie between values that are allowed."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return generator.choice([value, value * 2, value + 1, max(0, value - 1), generator.randrange(1, 3000), 0])
    if isinstance(value, float):
        return generator.choice([value, value * 2, value / 2, generator.random(), 0.0, 1.0])
    return generator.choice([value, *TEXTS])


def test_configs_are_refused_in_one_line_or_work(generator, workdir):
    passed = 0
    for trial in range(CONFIGS):
        file, words = generator.choice(READY), []
        given = file.get_config()
        for _ in range(generator.randrange(1, 6)):
            key = generator.choice(LEAVES)
            if generator.random() < 0.1:
                key = key.replace(generator.choice(key), generator.choice([".", "", "x"]), 1)
            value = any_value(generator)
            if generator.random() < 0.6 and key in LEAVES:
                value = likely_value(generator, value_of(given, key))
            words.append(f"--config.{key}={value}")
        if generator.random() < 0.3:
            words.append(f"--config.workdir={workdir}")
        with answers(f"{file.__name__} {words}"):
            config = config_files.override(file.__name__, given, words)
            devices = generator.choice([1, 2, 8, 128, 256, 3])
            preflight.check_devices(config, devices, generator.choice([1, 2]))
            preflight.check_models(config, devices)
            if config.workdir == str(workdir):
                preflight.check_artifacts(config)
            assert config_files_agree(config)
            passed += 1
        # As a config file may have it: values that no command line would let through.
        own = file.get_config().to_dict()
        *groups, name = generator.choice(["base", "training", "mesh.rules", *LEAVES]).split(".")
        group = functools.reduce(dict.__getitem__, groups, own)
        group[name] = any_value(generator)
        if generator.random() < 0.1:
            del group[name]
        with answers(f"{trial}: {file.__name__} with {groups} {name}={group.get(name)!r}"):
            check_config(config_files.override("own", ml_collections.ConfigDict(own), []))
    assert passed > CONFIGS / 50, "hardly any config was valid: the test tests nothing"


def config_files_agree(config) -> bool:
    """A config that passed is the same after it was written as a file and read again, as launchers send it."""
    module = {}
    exec(as_config_file(config, ""), module)
    return module["get_config"]().to_dict() == config.to_dict()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A finished run, as small as it can be."""
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    config = small_config(folder, steps=8, every=4, blocks=2, corpus__max_bytes=40_000)
    config.datastore.update({"sequences_per_shard": 100, "input_depth": 0.5})
    config.targets.update({"k": 4, "temperature": 3.0, "backend": "exact", "quality_positions": 16})
    for stage in stages.STAGES:
        if stage != "evaluate":
            stages.run(stage, config)
    return pathlib.Path(config.workdir)


def damage(generator: random.Random, content: bytes) -> bytes:
    """The content with a bit flipped, or truncated, or with some bytes of it lost, repeated or overwritten."""
    if not content:
        return b"\0"
    place, changed = generator.randrange(len(content)), bytearray(content)
    kind = generator.choice(["flip", "flip", "flip", "truncate", "lose", "repeat", "overwrite"])
    if kind == "flip":
        changed[place] ^= 1 << generator.randrange(8)
    elif kind == "truncate":
        del changed[place:]
    elif kind == "lose":
        del changed[place : place + generator.randrange(1, 64)]
    elif kind == "repeat":
        changed[place:place] = changed[place : place + generator.randrange(1, 64)]
    else:
        noise = generator.randbytes(min(generator.randrange(1, 64), len(content) - place))
        changed[place : place + len(noise)] = noise
    return bytes(changed)


ARTIFACTS = {
    "tokens": "tokens",
    "base": "base",
    "memory": "memory",
    **{f"datastore/{split}": "datastore" for split in SPLITS},
    **{f"targets/{split}": "targets" for split in SPLITS},
}


def content_of(workdir, name) -> str:
    """A checksum of all that can be read from an artifact."""
    artifact, digest = open_artifact(workdir / name, ARTIFACTS[name]), hashlib.sha256()
    for array, spec in sorted(artifact.arrays.items()):
        digest.update(np.ascontiguousarray(artifact.read(array, 0, spec.shape[0])).tobytes())
    for file in sorted(artifact._files):
        digest.update(artifact.read_file(file))
    digest.update(json.dumps([artifact.config, artifact.inputs, artifact.summary], sort_keys=True).encode())
    if ARTIFACTS[name] in ("base", "memory"):
        load = saved.load_memory if name == "memory" else saved.load_language_model
        parameters, *_ = load(workdir / name, Sharding(make_mesh(1, 1, 1, jax.devices()[:1])))
        for leaf in jax.tree.leaves(parameters):
            digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def test_damaged_artifacts_are_told_or_read_as_they_were_written(generator, workdir):
    expected = {name: content_of(workdir, name) for name in ARTIFACTS}
    owned = {name: [file for file in (workdir / name).rglob("*") if file.is_file()] for name in ARTIFACTS}
    told = 0
    for trial in range(DAMAGES):
        name = generator.choice(list(ARTIFACTS))
        file = generator.choice(owned[name])
        content = file.read_bytes()
        changed = damage(generator, content)
        file.write_bytes(changed)
        try:
            with answers(f"{trial}: {file}"):
                told += 1
                actual = content_of(workdir, name)
                told -= 1
                assert actual == expected[name], f"{trial}: {file} was changed, and read as good"
        finally:
            file.write_bytes(content)
    assert told > DAMAGES / 3, "hardly any damage was found: the test tests nothing"


def test_damaged_checkpoints_are_told_or_restored_as_they_were_saved(generator, tmp_path):
    parameters = {"kernel": np.arange(600, dtype=np.float32).reshape(30, 20)}
    state = jax.tree.map(jax.numpy.asarray, initial_state(parameters, optax.adam(1e-3)))
    checkpoints = Checkpoints(tmp_path)
    for step in (4, 8):
        checkpoints.save(step, {**state, "step": jax.numpy.int32(step)}, 8 * step, {"perplexity": 10.0 + step})
    checkpoints.wait()
    checkpoints.close()
    owned = [file for file in tmp_path.rglob("*") if file.is_file()]
    told = 0
    for trial in range(DAMAGES // 10):
        file = generator.choice(owned)
        content = file.read_bytes()
        file.write_bytes(damage(generator, content))
        try:
            with answers(f"{trial}: {file}"):
                told += 1
                opened = Checkpoints(tmp_path)
                for step in (opened.latest_step(), opened.best_step()):
                    restored, following = opened.restore(step, jax.eval_shape(lambda: state))
                    assert following == 8 * step, f"{trial}: {file}"
                    expected = {**state, "step": jax.numpy.int32(step)}
                    same = jax.tree.map(lambda a, b: bool((a == b).all()), restored, expected)
                    assert all(jax.tree.leaves(same)), f"{trial}: {file} was changed, and restored as good"
                    assert opened.validation(step) == {"perplexity": 10.0 + step}, f"{trial}: {file}"
                opened.close()
                told -= 1
        finally:
            file.write_bytes(content)
    assert told > DAMAGES / 50, "hardly any damage was found: the test tests nothing"


WORDS = ["alpha", "beta", "naïve", "東京", "x = 1", "\t", "it's", "<|endoftext|>", "\N{ROCKET}", "0.5"]


def corpus_file(generator: random.Random) -> tuple[str, bytes]:
    """(name, content) of a good corpus file of any kind that is read."""
    rows = [" ".join(generator.choices(WORDS, k=generator.randrange(1, 40))) for _ in range(40)]
    kind = generator.choice([".txt", ".md", ".jsonl", ".json", ".parquet"])
    if kind in (".txt", ".md"):
        content = "\n\n".join(rows).encode()
    elif kind == ".jsonl":
        content = "".join(json.dumps({"text": row, "n": 1}) + "\n" for row in rows).encode()
    elif kind == ".json":
        content = json.dumps([{"text": row} for row in rows]).encode()
    else:
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(
            pyarrow.table({"text": rows}), buffer, compression=generator.choice(["snappy", "none"])
        )
        return f"a{kind}", buffer.getvalue()
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    suffix = generator.choice(list(compress))
    return f"a{kind}{suffix}", compress[suffix](content)


def test_damaged_corpora_are_told_or_become_the_tokens_of_what_is_read(generator, tmp_path):
    sealed = 0
    for trial in range(CORPORA):
        folder = tmp_path / str(trial)
        (folder / "text").mkdir(parents=True)
        name, content = corpus_file(generator)
        (folder / "text" / "good.txt").write_text("\n\n".join(WORDS * 30))
        (folder / "text" / name).write_bytes(damage(generator, content))
        config = default.get_config()
        config.workdir = str(folder / "run")
        config.corpus.update({"source": "files", "path": str(folder / "text"), "document_bytes": 200})
        config.corpus.update({"validation_fraction": 0.3, "test_fraction": 0.3})
        config.tokenizer.vocab_size = 260
        config.base.context_length = 4
        with answers(f"{trial}: {folder / 'text' / name}"):
            artifact = tokens.run(config)
            texts = {text for part in files.open_source(config.corpus).parts() for text, _ in part.read()}
            encoder, end = tokens.read_tokenizer(artifact), artifact.summary["end_of_text_id"]
            for split in SPLITS:
                stream = tokens.TokenStream(artifact, split)
                start = 0
                for stop in stream.document_ends:
                    ids = stream.read(start, int(stop)).tolist()
                    text, start = encoder.decode(ids[:-1], skip_special_tokens=False), int(stop)
                    assert ids[-1] == end, f"{trial}: {name}"
                    assert text in texts or "\ufffd" in text, f"{trial}: {name}: {text!r}"
            sealed += 1
    assert CORPORA / 20 < sealed < CORPORA
