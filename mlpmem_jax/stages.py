"""The stages of a run, in order, and the module of each. Imports no accelerator runtime."""

from __future__ import annotations

import importlib

import ml_collections

STAGES = {
    "tokens": ("mlpmem_jax.corpus.tokens", "text -> token ids, split by whole files, articles or groups"),
    "base": ("mlpmem_jax.interop.base_model", "train the base language model, or import it from Hugging Face"),
    "datastore": ("mlpmem_jax.retrieval.datastore", "base LM forward pass -> keys and memory inputs"),
    "targets": ("mlpmem_jax.retrieval.targets", "nearest neighbors -> next-token distributions"),
    "train": ("mlpmem_jax.training.train_memory", "train the memory on those distributions"),
    "evaluate": ("mlpmem_jax.evaluation.evaluate", "perplexities, intervals and the report"),
}
"""Name -> (module with a `run(config)`, description), in the order in which `mlpmem run` runs them."""


def run(name: str, config: ml_collections.ConfigDict):
    """Runs a stage in this process, records its cost, and returns what its module's `run` returns."""
    from mlpmem_jax.core import stage_costs
    from mlpmem_jax.core.progress import say

    module, description = STAGES[name]
    say(f"== {name}: {description}")
    with stage_costs.measured(config.workdir, name):
        return importlib.import_module(module).run(config)
