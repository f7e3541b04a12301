"""`mlpmem generate`: continues a prompt with the base LM alone and with its memory, side by side."""

from __future__ import annotations

import jax
import ml_collections
import rich.console
import rich.table
import rich.text
from etils import epath

from mlpmem_jax.core.artifacts import open_artifact
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.corpus.tokens import encode_prompts, read_tokenizer
from mlpmem_jax.inference.decoding import DecoderConfig, Parameters, prepare, weights_dtype
from mlpmem_jax.inference.generate import generate
from mlpmem_jax.inference.sampling import Sampling
from mlpmem_jax.inference.weight import find_weight
from mlpmem_jax.models import saved


def run(
    config: ml_collections.ConfigDict,
    texts: list[str],
    *,
    count: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> None:
    """Prints continuations of prompts by the models in `config.workdir`.

    Args:
      config: resolved; its workdir has tokens, base and memory.
      texts: the prompts.
      count: number of tokens to add to each.
      temperature, top_k, top_p: as in `Sampling`.
      seed: random seed for sampling.

    Raises:
      UserError: a model is missing, a prompt is too long, an option is out of range.
    """
    sampling = Sampling(temperature, top_k, top_p)
    workdir = epath.Path(config.workdir)
    tokens = open_artifact(workdir / "tokens", "tokens")
    sharding = Sharding.of(config)
    base, base_model, base_artifact = saved.load_language_model(workdir / "base", sharding)
    memory, memory_model, artifact = saved.load_memory(workdir / "memory", sharding)
    base_artifact.check_made_from({"tokens": tokens})
    artifact.check_made_from({"base": base_artifact})
    weight, block = find_weight(workdir, artifact), saved.input_block(artifact)

    tokenizer, prompts = read_tokenizer(tokens), encode_prompts(tokens, texts)
    both = prepare(Parameters(base, memory, weight.value), weights_dtype(config.datastore.compute_dtype))
    del base, memory
    columns = {}
    for title, models, parameters in (
        ("base LM", DecoderConfig(base_model), Parameters(both.base)),
        (
            f"base LM + memory (lambda {weight.value:.2f})",
            DecoderConfig(base_model, memory_model, block),
            both,
        ),
    ):
        new = generate(
            models,
            parameters,
            prompts,
            count=count,
            sampling=sampling,
            seed=seed,
            end_token=tokens.summary["end_of_text_id"],
        )
        columns[title] = [tokenizer.decode(ids.tolist()) for ids in new]
    if jax.process_index() == 0:
        _show(texts, columns)
        print(f"lambda {weight.value:.4f}: {weight.source}")


def _show(prompts: list[str], columns: dict[str, list[str]]) -> None:
    console = rich.console.Console()
    for index, prompt in enumerate(prompts):
        table = rich.table.Table(title=rich.text.Text(prompt), title_justify="left", show_lines=True, expand=True)
        for title in columns:
            table.add_column(title, ratio=1)
        table.add_row(*(rich.text.Text(texts[index]) for texts in columns.values()))
        console.print(table)
