"""Every ready config and sweep runs whole, its sizes lowered and nothing else, as a job of 2 processes x 2 devices.

Whatever a config names is there under that name: models and tokenizers in a cache of the Hugging Face hub, data sets
and files in the folder that the jobs run in, all of them small.
"""

import dataclasses
import gzip
import json
import pathlib
import shutil
import sys

import pytest
import test_comparison_reference
import test_gguf
import transformers
import zstandard

from configs import library_h100, mistral_7b_compare, smollm2, smollm2_nq, smollm2_wikitext2
from launch import local
from mlpmem_jax.core import config_files
from mlpmem_jax.core.config import as_config_file, check_config
from mlpmem_jax.corpus import tokenizer
from mlpmem_jax.scaling import collection, sweep, tasks

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(file for file in (ROOT / "configs").glob("*.py") if file.stem not in ("__init__", "default"))
SWEEPS = sorted(
    file for file in (ROOT / "configs" / "sweeps").glob("*.py") if file.stem not in ("__init__", "gpt2_sizes")
)

OWNER = "tiny"
WIDTH, VOCABULARY, LENGTH = test_gguf.WIDTH, 300, 16
LARGEST_OPTIMIZATION = {
    "steps": 12,
    "epochs": 0.5,
    "batch_sequences": 16,
    "accumulation_steps": 2,
    "warmup_steps": 2,
    "loss_chunk": 32,
    "evaluate_every": 6,
    "checkpoint_every": 6,
}
LARGEST = {
    "corpus.max_bytes": 60_000,
    "corpus.document_bytes": 2048,
    "tokenizer.vocab_size": VOCABULARY,
    "base.context_length": LENGTH,
    "base.width": WIDTH,
    "base.blocks": 2,
    "base.heads": 2,
    "datastore.batch_sequences": 16,
    "datastore.sequences_per_shard": 256,
    "targets.k": 8,
    "targets.key_shard_rows": 10_000,
    "targets.training_sample": 1000,
    "targets.quality_positions": 64,
    "memory.width": WIDTH,
    "memory.blocks": 2,
    "memory.feed_forward_width": 2 * WIDTH,
    "evaluation.sharpness_positions": 50,
    **{f"{group}.{key}": most for group in ("base.training", "training") for key, most in LARGEST_OPTIMIZATION.items()},
}


def shrunk(config, workdir):
    """The config with each of its sizes at most the one in LARGEST, in another workdir; every choice as it was.

    Held-out parts are a tenth at least, so that they are not empty. Models of the hub are OWNER's, which have the
    published ones' names and architectures, but not the dimensions that launchers know of those.
    """
    config = config.copy_and_resolve_references()
    for key, most in LARGEST.items():
        group, _, name = key.rpartition(".")
        values = config
        for part in group.split("."):
            values = values[part]
        values[name] = min(values[name], most) or (most if name == "max_bytes" else 0)
    for fraction in ("validation_fraction", "test_fraction"):
        config.corpus[fraction] = max(config.corpus[fraction], 0.1)
    for group, name in (("base", "path"), ("tokenizer", "path"), ("datastore", "key_model")):
        owner, _, model = config[group][name].partition("/")
        if owner in ("openai-community", "meta-llama", "mistralai"):
            config[group][name] = f"{OWNER}/{model}"
    config.workdir = str(workdir)
    check_config(config)
    return config


def articles():
    """(title, paragraphs) of some English text."""
    paragraphs = [
        " ".join(text.split())
        for file in sorted((ROOT / "docs").glob("*.md"))
        for text in file.read_text().split("\n\n")
    ]
    return [(f"Article {start}", paragraphs[start : start + 4]) for start in range(0, len(paragraphs), 4)]


def write_data_set(folder, subset, rows, splits):
    """A data set as the hub has them: JSON lines for each split, in a configuration of that name; others may follow."""
    folder.mkdir(parents=True, exist_ok=True)
    config, readme = subset or "default", folder / "README.md"
    files = "".join(f"      - split: {split}\n        path: {config}-{split}.jsonl\n" for split in splits)
    others = readme.read_text().removeprefix("---\nconfigs:\n").removesuffix("---\n") if readme.exists() else ""
    readme.write_text(f"---\nconfigs:\n{others}  - config_name: {config}\n    data_files:\n{files}---\n")
    for number, split in enumerate(splits):
        lines = (json.dumps(row) for row in rows[number :: len(splits)] for row in row)
        (folder / f"{config}-{split}.jsonl").write_text("\n".join(lines) + "\n")


def write_data(folder):
    text = articles()
    wikitext = [
        [{"text": line} for line in (f" = {title} = \n", "", *(f" {paragraph} \n" for paragraph in paragraphs), "")]
        for title, paragraphs in text
    ]
    write_data_set(folder / "Salesforce/wikitext", "wikitext-103-raw-v1", wikitext, ["train", "validation", "test"])
    for name, subset, key in (
        ("wikimedia/wikipedia", "20231101.en", "text"),
        ("fancyzhx/amazon_polarity", "", "content"),
        ("vblagoje/cc_news", "", "text"),
        ("stanfordnlp/imdb", "", "text"),
    ):
        write_data_set(folder / name, subset, [[{key: "\n\n".join(paragraphs)}] for _, paragraphs in text], ["train"])
    passages = folder / smollm2_nq.get_config().corpus.path
    passages.parent.mkdir(parents=True)
    with gzip.open(passages, "wt") as file:
        for title, paragraphs in text:
            for paragraph in paragraphs:
                file.write(json.dumps({"ctxs": [{"title": title, "text": paragraph}]}) + "\n")
    held_out = folder / smollm2_wikitext2.get_config().corpus.path
    held_out.mkdir(parents=True)
    (held_out / "test.txt").write_text("\n".join(row["text"].removesuffix("\n") for rows in wikitext for row in rows))
    library = folder / library_h100.get_config().corpus.path
    library.parent.mkdir(parents=True)
    rows = [
        {"text": paragraph, "source": "library", "path": f"{title}#{part:04}"}
        for title, paragraphs in text
        for part, paragraph in enumerate(paragraphs)
    ]
    library.write_bytes(zstandard.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def write_questions(folder):
    """What mistral_7b_compare asks: data sets of the hub, and files that it does not have."""
    comparison = mistral_7b_compare.get_config().comparison
    data = folder / comparison.data
    questions = [{"question": f"What is article {number}", "answer": ["docs", "text"]} for number in range(4)]
    (data / "truthfulqa").mkdir(parents=True)
    test_comparison_reference.write_data(data)
    for file in ("truthfulqa", "pmi/rt", "pmi/sst2", "pmi/rte", "pmi/cb", "pmi/yahoo"):
        shutil.rmtree(data / file)
    (data / "halueval" / "qa_one-turn_data.json").unlink()
    for name in ("dialogue", "summarization"):
        shutil.copy(
            data / "halueval/qa_evaluation_instruction.txt", data / f"halueval/{name}_evaluation_instruction.txt"
        )
    fields = {
        "qa": ("question", "right_answer", "hallucinated_answer"),
        "dialogue": ("dialogue_history", "right_response", "hallucinated_response"),
        "summarization": ("document", "right_summary", "hallucinated_summary"),
    }
    sets = {
        ("google-research-datasets/nq_open", ""): questions,
        ("stanfordnlp/web_questions", ""): [{"question": "What?", "answers": ["docs"]}] * 3,
        ("mandarjoshi/trivia_qa", "unfiltered.nocontext"): [{"question": "Who?", "answer": {"aliases": ["He"]}}] * 3,
        ("hotpotqa/hotpot_qa", "distractor"): [{"question": "Is it?", "answer": "yes"}] * 3,
        ("truthfulqa/truthful_qa", "generation"): [
            {"question": "Is it?", "best_answer": "Yes", "correct_answers": ["Yes"], "incorrect_answers": ["No", "A"]}
        ] * 3,
        ("cornell-movie-review-data/rotten_tomatoes", ""): [{"text": "good", "label": 1}, {"text": "bad", "label": 0}],
        ("SetFit/sst5", ""): [{"text": "good", "label": 4}, {"text": "bad", "label": 0}],
        ("nyu-mll/glue", "rte"): [{"sentence1": "It is.", "sentence2": "Is it?", "label": 1}] * 2,
        ("aps/super_glue", "cb"): [{"premise": "It is.", "hypothesis": "Is it?", "label": 2}] * 2,
        ("community-datasets/yahoo_answers_topics", ""): [
            {"question_title": "Why?", "question_content": "", "best_answer": "So.", "topic": 3}
        ] * 3,
        **{("pminervini/HaluEval", name): [dict.fromkeys(fields[name], "It is so.")] * 3 for name in fields},
    }  # fmt: skip
    for (name, subset), rows in sets.items():
        write_data_set(folder / name, subset, [rows] * 4, ["train", "validation", "test", "data"])
    encoder = folder / comparison.retriever
    trained = tokenizer.train((paragraph for _, paragraphs in articles() for paragraph in paragraphs), VOCABULARY)
    bert = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(bert).save_pretrained(encoder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=trained, pad_token=trained.id_to_token(0)).save_pretrained(
        encoder
    )


def write_models(folder, cache):
    """Random models of the published ones' architectures: in the hub's cache, with a tokenizer, and as a GGUF file."""
    trained = tokenizer.train((paragraph for _, paragraphs in articles() for paragraph in paragraphs), VOCABULARY)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "max_position_embeddings": 16 * LENGTH}
    llama = sizes | {"intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    models = {
        f"{OWNER}/Llama-2-7b-hf": transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama)),
        f"{OWNER}/Mistral-7B-v0.3": transformers.MistralForCausalLM(
            transformers.MistralConfig(**llama, num_key_value_heads=2, sliding_window=None)
        ),
    }
    for name, blocks in (("gpt2", 2), ("gpt2-medium", 3), ("gpt2-large", 2), ("gpt2-xl", 3)):
        gpt2 = transformers.GPT2Config(**sizes, num_hidden_layers=blocks, num_attention_heads=4)
        models[f"{OWNER}/{name}"] = transformers.GPT2LMHeadModel(gpt2)
    for name, model in models.items():
        repository = cache / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / f"{1:040x}"
        model.save_pretrained(snapshot)
        trained.save(str(snapshot / "tokenizer.json"))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(snapshot.name)
    gguf = folder / smollm2.MODEL
    gguf.parent.mkdir()
    test_gguf.write(gguf, "Q4_1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ready")
    write_data(folder)
    write_questions(folder)
    write_models(folder, folder / "huggingface" / "hub")
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # the number of devices is the launcher's
    monkeypatch.setenv("HF_HOME", str(folder / "huggingface"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(folder)
    return folder


def launched(config_file, stage):
    with pytest.raises(SystemExit) as ended:
        local.main([f"--config={config_file}", f"--stage={stage}", "--processes=2", "--devices=2"])
    assert ended.value.code == 0, stage


def job(config_file, *words):
    command = [sys.executable, "-m", "mlpmem_jax.cli", words[0], f"--config={config_file}", *words[1:]]
    assert local.run_processes(command, local.environments(2, 2, local.free_port())) == 0, words


@pytest.mark.parametrize("file", CONFIGS, ids=[file.stem for file in CONFIGS])
def test_a_config_runs_whole(file, here, capfd):
    workdir, again = here / file.stem, here / f"{file.stem}_imported"
    ready = config_files.read(str(file), [])
    config, imported = here / f"{file.stem}.py", here / f"{file.stem}_imported.py"
    config.write_text(as_config_file(shrunk(ready, workdir), ""))
    imported.write_text(as_config_file(shrunk(ready, again), ""))

    launched(config, "run")
    launched(config, "controls")
    metrics = json.loads((workdir / "report" / "metrics.json").read_text())
    assert metrics["controls"].keys() == {"continued", "ce_only"}

    capfd.readouterr()
    job(config, "generate", "--prompt=The", "--tokens=3")
    assert capfd.readouterr().out.count("base LM + memory") == 1
    job(config, "export", "--format=transformers", f"--output={here / file.stem}_exported")
    if ready.comparison.hub:
        job(config, "compare")
        compared = json.loads((workdir / "comparison" / "compare.json").read_text())
        assert list(compared["systems"]) == ready.comparison.systems.split(",")
        assert list(compared["tasks"]) == ready.comparison.tasks.split(",")
    shutil.copytree(workdir / "tokens", again / "tokens")
    job(imported, "import", f"--from={here / file.stem}_exported")
    ours, theirs = (json.loads((at / "memory" / "manifest.json").read_text())["summary"] for at in (again, workdir))
    assert ours["parameter_count"] == theirs["parameter_count"]
    assert ours["input_block"] == theirs["input_block"]


@pytest.mark.parametrize("file", SWEEPS, ids=[file.stem for file in SWEEPS])
def test_a_sweep_runs_whole(file, here):
    """Of each arm the first and the last point, with the units that they rest on, as launchers send them."""
    ready = sweep.read(str(file))
    workdir, points = here / file.stem, {}
    for arm in sweep.ARMS:
        of_arm = [point for point in ready.points if point.arm == arm]
        points |= {point.name: point for point in (of_arm[:1] + of_arm[-1:])}
    smaller = [
        dataclasses.replace(point, config=shrunk(point.config, workdir / "points" / point.name))
        for point in points.values()
    ]
    small = dataclasses.replace(ready, workdir=str(workdir), points=tuple(smaller))
    for task in tasks.of_sweep(small):
        task.prepare()
        launched(f"{task.config.workdir}/config.py", task.verb)
        assert task.is_finished()
    rows = collection.write(small, set(points)).read_text().splitlines()
    assert len(rows) == 1 + len(points)
