"""The model card of an exported memory: README.md, generated from its config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping

_TEMPLATE = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- mlp-memory
---

# A language model with an MLP memory

A base language model ({base_type}, {base_parameters:,} parameters) with a memory ({memory_parameters:,} parameters), an
all-MLP network trained to predict the next-token distribution that a nearest-neighbor search in its training corpus
would give ([MLP Memory](https://arxiv.org/abs/2508.01832)). The next token follows
`lambda * p_memory + (1 - lambda) * p_base` with lambda = {weight:.4f}.

```python
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
model.config.interpolation_weight = 0.25  # 0: the base alone
prompt = tokenizer("The memory", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32)[0]))

memory = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)  # the memory alone: hidden states to logits
```

Logits are log-probabilities of the mixture. The memory reads the input of the feed-forward layer of block
{input_block} of the base, and runs only where logits are requested (`logits_to_keep`).

## Measured

{measured}

## Provenance

```json
{provenance}
```
"""
_SYSTEMS = {"base": "base", "memory": "memory alone", "augmented": "base + memory", "knn_lm": "kNN-LM"}


def render(values: Mapping) -> str:
    """The card of the model with the config.json `values`."""
    provenance = {name: value for name, value in values["provenance"].items() if name != "perplexity"}
    parameters = provenance["parameters"]
    return _TEMPLATE.format(
        base_type=values["base_config"]["model_type"],
        base_parameters=parameters["base"],
        memory_parameters=parameters["memory"],
        weight=values["interpolation_weight"],
        input_block=values["input_block"],
        measured=_table(values["provenance"].get("perplexity", {})),
        provenance=json.dumps(provenance, indent=2, sort_keys=True),
    )


def _table(perplexity: Mapping) -> str:
    if not perplexity:
        return "No perplexities were measured before this export."
    splits = sorted(perplexity, reverse=True)
    lines = [f"| perplexity | {' | '.join(splits)} |", f"|---|{'---|' * len(splits)}"]
    for name, words in _SYSTEMS.items():
        lines.append(f"| {words} | {' | '.join(f'{perplexity[split][name]:.4g}' for split in splits)} |")
    return "\n".join(lines)
