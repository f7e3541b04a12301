"""Checks a resolved config before any compute. Imports no accelerator runtime, because `launch/` uses it too."""

from __future__ import annotations

import difflib
import json
import os
import pprint
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ml_collections

from mlpmem_jax.core import storage
from mlpmem_jax.core.errors import ConfigError

Check = tuple[type | tuple[type, ...], Callable[[Any], bool], str]
"""Allowed types, a predicate, and the predicate in words."""


SEARCH_BACKENDS = {
    "scann": "mlpmem_jax.retrieval.scann_backend",
    "exact": "mlpmem_jax.retrieval.exact_backend",
}
"""Modules of search backends by their names in config.targets.backend; see `mlpmem_jax.retrieval.backends`. "auto" is
the first one that the machine can run."""


OPTIMIZERS = ("adamw", "muon")
"""Values of config.training.optimizer; `mlpmem_jax.training.optimizer` has the optimizers."""


def _one_of(*values: str) -> Check:
    return str, lambda value: value in values, "one of " + ", ".join(map(repr, values))


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _is_plain(path: str) -> bool:
    """Whether TensorStore can use a path as it is: it takes backslashes for slashes, and encodes as UTF-8, which fails
    for other bytes and in an ASCII locale."""
    return "\\" not in path and path.encode(errors="replace").decode() == path


def profiled_steps(text: str) -> range:
    """The steps of a `profile_steps` "A:B", including both ends; empty for "" and invalid values."""
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first)):
        return range(0)
    return range(int(first), int(last) + 1)


_TEXT: Check = (str, lambda value: True, "a text")
_BOOLEAN: Check = (bool, lambda value: True, "True or False")
_COUNT: Check = (int, lambda value: 0 <= value < 2**63, "a whole number, 0 or more")
_POSITIVE: Check = (int, lambda value: 0 < value < 2**63, "a whole number, 1 or more")
_STEP_COUNT: Check = (int, lambda value: 0 <= value < 2**31, "a whole number from 0 to 2**31 - 1")  # counted in int32
_SEED: Check = (int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2**32 - 1")
_NON_NEGATIVE: Check = ((int, float), lambda value: value >= 0, "a number, 0 or more")
_FRACTION: Check = ((int, float), lambda value: 0 <= value <= 1, "a number from 0 to 1")
_BELOW_ONE: Check = ((int, float), lambda value: 0 <= value < 1, "a number from 0 to below 1")
_OPEN_FRACTION: Check = ((int, float), lambda value: 0 < value < 1, "a number between 0 and 1")
_MESH_SIZE: Check = (int, lambda value: value > 0 or value == -1, "a whole number, 1 or more, or -1 for all the rest")
_MESH_AXES: Check = (
    str,
    lambda value: all(axis in ("slice", "fsdp", "tensor") for axis in value.split("+") if value),
    "mesh axes among 'slice', 'fsdp', 'tensor' with '+' between them, or ''",
)
_STEPS: Check = (
    str,
    lambda value: value == "" or len(profiled_steps(value)) > 0,
    "two steps 'A:B' with 1 <= A <= B, or ''",
)
_TEMPERATURE: Check = (
    (int, float),
    lambda value: value == 0 or 1e-6 <= value <= 1e9,
    "a number from 1e-6 to 1e9, or 0 for the best one",
)

_OPTIMIZATION: dict[str, Check] = {
    "steps": _STEP_COUNT,
    "epochs": ((int, float), lambda value: 0 <= value <= 1e6, "a number from 0 to 1e6"),
    "batch_sequences": _POSITIVE,
    "accumulation_steps": _POSITIVE,
    "optimizer": _one_of(*OPTIMIZERS),
    "learning_rate": _NON_NEGATIVE,
    "adam_learning_rate": _NON_NEGATIVE,
    "schedule": _one_of("linear", "cosine", "constant"),
    "warmup_steps": _COUNT,
    "weight_decay": _NON_NEGATIVE,
    "beta1": _BELOW_ONE,
    "beta2": _BELOW_ONE,
    "clip_norm": _NON_NEGATIVE,
    "compute_dtype": _one_of("float32", "bfloat16"),
    "remat": _BOOLEAN,
    "loss_chunk": _POSITIVE,
    "seed": _SEED,
    "evaluate_every": _POSITIVE,
    "evaluation_sequences": _COUNT,
    "checkpoint_every": _POSITIVE,
    "profile_steps": _STEPS,
}

SCHEMA: dict[str, Any] = {
    "workdir": (str, lambda value: value != "" and _is_plain(value), "a path in UTF-8 (LC_ALL=C.UTF-8), without '\\'"),
    "corpus": {
        "source": _one_of("installed_docs", "files", "hub"),
        "packages": _TEXT,
        "path": _TEXT,
        "name": _TEXT,
        "subset": _TEXT,
        "text_key": _TEXT,
        "group_key": _TEXT,
        "group_part": (str, _is_pattern, "a regular expression"),
        "articles": (
            str,
            lambda value: set(value.split(",")) <= {"", "wikitext"},
            "'wikitext' or '', one for each data set with commas between",
        ),
        "split_by_name": _BOOLEAN,
        "max_bytes": _COUNT,
        "document_bytes": _POSITIVE,
        "validation_fraction": _OPEN_FRACTION,
        "test_fraction": _OPEN_FRACTION,
        "seed": _SEED,
    },
    "tokenizer": {
        "source": _one_of("train", "file", "hub", "gguf"),
        "path": _TEXT,
        "end_of_text": _TEXT,
        "vocab_size": _POSITIVE,
    },
    "base": {
        "source": _one_of("train", "huggingface", "gguf"),
        "path": _TEXT,
        "finetune_steps": _STEP_COUNT,
        "context_length": _POSITIVE,
        "width": _POSITIVE,
        "blocks": _POSITIVE,
        "heads": _POSITIVE,
        "training": _OPTIMIZATION,
    },
    "datastore": {
        "dtype": _one_of("float16", "bfloat16"),
        "compute_dtype": _one_of("float32", "bfloat16"),
        "input_depth": ((int, float), lambda value: 0 < value <= 1, "a number above 0, up to 1"),
        "key_model": _TEXT,
        "batch_sequences": _POSITIVE,
        "sequences_per_shard": _POSITIVE,
    },
    "targets": {
        "backend": _one_of("auto", *SEARCH_BACKENDS),
        "k": _POSITIVE,
        "temperature": _TEMPERATURE,
        "exclude": _one_of("self", "document"),
        "keep": _COUNT,
        "minimum_probability": _NON_NEGATIVE,
        "key_shard_rows": (int, lambda value: 0 < value < 2**31, "a whole number from 1 to 2**31 - 1"),
        "recall": _FRACTION,
        "search_dimensions": _COUNT,
        "recall_target": ((int, float), lambda value: 0 < value <= 1, "a number above 0, up to 1"),
        "leaves": _COUNT,
        "leaves_to_search": _COUNT,
        "reorder": _COUNT,
        "training_sample": _POSITIVE,
        "quality_positions": _POSITIVE,
    },
    "memory": {
        "family": _one_of("gpt2", "llama"),
        "width": _POSITIVE,
        "blocks": _POSITIVE,
        "feed_forward_width": _COUNT,
        "output_from_base": _BOOLEAN,
    },
    "training": {**_OPTIMIZATION, "mode": _one_of("offline", "online"), "alpha": _FRACTION, "start": _TEXT},
    "evaluation": {
        "confidence": _OPEN_FRACTION,
        "sharpness_positions": _POSITIVE,
        "seed": _SEED,
    },
    "comparison": {
        "systems": _TEXT,
        "tasks": _TEXT,
        "data": _TEXT,
        "hub": _BOOLEAN,
        "limit": _COUNT,
        "tuning_questions": _POSITIVE,
        "retriever": (str, lambda value: value != "", "'bm25' or the folder of a sentence encoder"),
        "passages": _POSITIVE,
        "passage_words": _POSITIVE,
        "k": _COUNT,
        "speed": {
            "positions": (
                str,
                lambda text: all(one.isdecimal() and int(one) for one in text.split(",")),
                "numbers with commas",
            ),
            "prompt_tokens": _POSITIVE,
            "new_tokens": _POSITIVE,
            "rounds": _POSITIVE,
        },
        "seed": _SEED,
    },
    "mesh": {
        "slice": _MESH_SIZE,
        "fsdp": _MESH_SIZE,
        "tensor": _MESH_SIZE,
        "rules": dict.fromkeys(("batch", "embed", "mlp", "heads", "vocab"), _MESH_AXES),
    },
}


INPUTS = ("corpus.path", "tokenizer.path", "base.path", "datastore.key_model", "training.start")
"""Keys of what the stages read from outside the working directory: a path, or a name that may be one."""
LOCAL = ("comparison.data", "comparison.retriever")
"""Keys of what `mlpmem compare` also reads, which are always local paths."""
PATHS = ("workdir", *INPUTS, *LOCAL)
"""Keys whose value is a path, or a name that may be one."""

_FILES, _HUB, _RETRIEVING = ("files",), ("hub",), ("rag", "memory+rag")
_ANY_TEXT = ("FIELD",)  # any text but the empty one; errors print this one
USED_WITH: dict[str, tuple[str, tuple]] = {
    # Key: (the key that it depends on, the values of that key, or entries of a list, for which it has an effect).
    "corpus.packages": ("corpus.source", ("installed_docs",)),
    "corpus.path": ("corpus.source", _FILES),
    "corpus.name": ("corpus.source", _HUB),
    "corpus.subset": ("corpus.source", _HUB),
    "corpus.text_key": ("corpus.source", _FILES + _HUB),
    "corpus.group_key": ("corpus.source", _FILES + _HUB),
    "corpus.group_part": ("corpus.group_key", _ANY_TEXT),
    "corpus.articles": ("corpus.source", _FILES + _HUB),
    "corpus.split_by_name": ("corpus.source", _FILES),
    "corpus.document_bytes": ("corpus.source", _FILES + _HUB),
    "tokenizer.path": ("tokenizer.source", ("file", "hub", "gguf")),
    "tokenizer.end_of_text": ("tokenizer.source", ("file", "hub", "gguf")),
    "tokenizer.vocab_size": ("tokenizer.source", ("train",)),
    "base.path": ("base.source", ("huggingface", "gguf")),
    "base.finetune_steps": ("base.source", ("huggingface", "gguf")),
    "base.width": ("base.source", ("train",)),
    "base.blocks": ("base.source", ("train",)),
    "base.heads": ("base.source", ("train",)),
    "base.training.epochs": ("base.training.steps", (0,)),
    "base.training.adam_learning_rate": ("base.training.optimizer", ("muon",)),
    "targets.leaves": ("targets.backend", ("auto", "scann")),
    "targets.leaves_to_search": ("targets.backend", ("auto", "scann")),
    "targets.reorder": ("targets.backend", ("auto", "scann")),
    "targets.recall_target": ("targets.backend", ("auto", "exact")),
    "memory.output_from_base": ("training.start", ("",)),
    "training.epochs": ("training.steps", (0,)),
    "training.adam_learning_rate": ("training.optimizer", ("muon",)),
    "comparison.retriever": ("comparison.systems", _RETRIEVING),
    "comparison.passages": ("comparison.systems", _RETRIEVING),
    "comparison.passage_words": ("comparison.systems", _RETRIEVING),
    "comparison.k": ("comparison.systems", ("knn_lm",)),
}
_NOT_OF_FINETUNING = ("steps", "epochs", "optimizer", "learning_rate", "adam_learning_rate")
"""Keys of base.training that do not apply to fine-tuning an imported base, which sets its own values."""
_NAMES = (
    *("corpus.packages", "corpus.path", "corpus.name", "corpus.subset"),
    *("tokenizer.path", "tokenizer.end_of_text", "base.path"),
)
"""The keys among these that name a source: "" unless they are used."""


def unknown_key(key: str, allowed: list[str]) -> ConfigError:
    """The error for a nonexistent key, suggesting the nearest existing one."""
    near = difflib.get_close_matches(key, allowed, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ConfigError(f"config.{key}: no such key; {hint}Keys there: {', '.join(sorted(allowed))}")


def first_unknown(overrides: Iterable[str]) -> ConfigError | None:
    """The error for the first `--config.key=value` whose key does not exist; None if all exist."""
    for word in overrides:
        key = word.removeprefix("--config.").split("=", 1)[0]
        group = SCHEMA
        for depth, part in enumerate(key.split("."), start=1):
            if not isinstance(group, dict) or part not in group:
                prefix = ".".join(key.split(".")[: depth - 1])
                allowed = group if isinstance(group, dict) else {}
                return unknown_key(key, [f"{prefix}.{name}".lstrip(".") for name in allowed])
            group = group[part]
    return None


def _check_tree(config: Mapping, schema: Mapping, prefix: str) -> None:
    for key in config:
        if key not in schema:
            raise unknown_key(f"{prefix}{key}", [f"{prefix}{name}" for name in schema])
    for key, rule in schema.items():
        name = f"config.{prefix}{key}"
        if key not in config:
            raise ConfigError(f"{name}: is missing; start from configs/default.py, which has every key")
        value = config[key]
        if isinstance(rule, dict):
            if not isinstance(value, Mapping | ml_collections.ConfigDict):
                raise ConfigError(f"{name}: expected a group of keys, found {value!r}")
            _check_tree(value, rule, f"{prefix}{key}.")
            continue
        types, predicate, words = rule
        is_boolean_for_number = isinstance(value, bool) and types is not bool
        is_finite = not isinstance(value, int | float) or abs(value) <= sys.float_info.max
        if is_boolean_for_number or not isinstance(value, types) or not is_finite or not predicate(value):
            raise ConfigError(f"{name}: expected {words}, found {value!r}")


def value_of(config: ml_collections.ConfigDict, key: str):
    """The value of "group.key"; None if the config has no such key."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, ml_collections.ConfigDict) else None
    return config


def _set(config: ml_collections.ConfigDict, key: str, value: str) -> None:
    group, _, name = key.rpartition(".")
    (config[group] if group else config)[name] = value


def _unmet(config: ml_collections.ConfigDict, key: str) -> tuple[str, tuple] | None:
    """(the key that makes `key` ineffective, its values for which `key` has an effect); None if it has an effect."""
    rules = [USED_WITH[key]] if key in USED_WITH else []
    group, _, name = key.rpartition(".")
    if group == "base.training" and (not config.base.finetune_steps or name in _NOT_OF_FINETUNING):
        rules.insert(0, ("base.source", ("train",)))
    return next((rule for rule in rules if not _is_met(config, *rule)), None)


def _is_met(config: ml_collections.ConfigDict, decider: str, values: tuple) -> bool:
    value = value_of(config, decider)
    if values is _ANY_TEXT:
        return bool(value)
    return any(entry in values for entry in (value.split(",") if isinstance(value, str) else [value]))


def _idle(config: ml_collections.ConfigDict, key: str, decider: str, values: tuple) -> ConfigError:
    value, deciding = value_of(config, key), value_of(config, decider)
    return ConfigError(
        f"config.{key}: {value!r} has no effect with config.{decider}={deciding!r}; leave it out, or set "
        f"config.{decider} to {' or '.join(map(repr, values))}"
    )


def settle(config: ml_collections.ConfigDict, before: ml_collections.ConfigDict, overridden: Sequence[str]) -> None:
    """Normalizes a config whose keys `overridden` were set on the command line; modifies only `config`.

    Paths under ~ become absolute. If an override changes a source (such as `corpus.source`), the file's settings of the
    previous source are cleared.

    Args:
      config: the config with overrides.
      before: the config as defined in the file.
      overridden: names of keys, e.g. "corpus.path".

    Raises:
      ConfigError: a key has an invalid value, or was overridden but has no effect; names the key it depends on.
    """
    _check_tree(config, SCHEMA, "")
    for key in (*overridden, *_NAMES):
        if not (rule := _unmet(config, key)):
            continue
        if key in overridden and value_of(config, key) != value_of(before, key):
            raise _idle(config, key, *rule)
        if key in _NAMES and rule[0] in overridden:
            _set(config, key, "")
    for key in PATHS:
        path = expand_home(value_of(config, key))
        check = storage.check_local if key in LOCAL else storage.check_url
        check(path, f"config.{key}: ")
        _set(config, key, path)


def expand_home(path: str) -> str:
    """The path, with ~ or ~NAME at its start replaced by that user's home, and without file://.

    Raises:
      ConfigError: that user has no home here.
    """
    expanded = os.path.expanduser(path.removeprefix("file://") if path.startswith("file:///") else path)
    if expanded.startswith("~"):
        raise ConfigError(f"{path}: {path.split('/')[0]} is not the home of a user here; write out the path")
    return expanded


def check_config(config: ml_collections.ConfigDict) -> None:
    """Checks every key of a resolved config, and that keys are consistent.

    Raises:
      ConfigError: names the key, what is allowed and what was found.
    """
    _check_tree(config, SCHEMA, "")
    for key in _NAMES:
        if value_of(config, key) and (rule := _unmet(config, key)):
            raise _idle(config, key, *rule)
    corpus, tokenizer, base, training = config.corpus, config.tokenizer, config.base, config.training
    for name, source, needed in (
        ("corpus.path", corpus.source == "files", corpus.path),
        ("corpus.name", corpus.source == "hub", corpus.name),
        ("tokenizer.path", tokenizer.source != "train", tokenizer.path),
        ("base.path", base.source != "train", base.path),
    ):
        if source and not needed:
            group = name.split(".")[0]
            raise ConfigError(
                f"config.{name}: is needed with config.{group}.source={config[group].source!r}, but empty"
            )
    if base.source != "train" and tokenizer.source == "train":
        raise ConfigError(
            f"config.tokenizer.source: 'train' makes a new tokenizer, whose token ids mean nothing to the model that "
            f"config.base.source={base.source!r} imports; use the model's own: set config.tokenizer.source to 'file', "
            "'hub' or 'gguf', and config.tokenizer.path"
        )
    for key in ("corpus.path", "corpus.name"):
        for folder in value_of(config, key).split(","):
            _check_outside(config.workdir, key, folder)
    if corpus.validation_fraction + corpus.test_fraction >= 1:
        raise ConfigError("config.corpus: validation_fraction + test_fraction leave nothing to train on")
    if base.width % base.heads:
        raise ConfigError(f"config.base.heads: {base.heads} does not divide config.base.width, {base.width}")
    if tokenizer.source == "train" and tokenizer.vocab_size < 257:
        raise ConfigError(
            "config.tokenizer.vocab_size: expected 257 or more (256 bytes and the end of text), "
            f"found {tokenizer.vocab_size}"
        )
    for name, settings in (("base.training", base.training), ("training", training)):
        if settings.steps == 0 and settings.epochs == 0:
            raise ConfigError(f"config.{name}: steps and epochs are both 0; set one of them")
        if 0 < settings.steps <= settings.warmup_steps:
            raise ConfigError(
                f"config.{name}.warmup_steps: {settings.warmup_steps} steps of warmup leave none of the "
                f"{settings.steps} of config.{name}.steps to train at the full rate; lower warmup_steps or train longer"
            )
        check_profile(f"config.{name}.profile_steps", settings.profile_steps, settings.steps)
        if settings.batch_sequences % settings.accumulation_steps:
            raise ConfigError(
                f"config.{name}.accumulation_steps: {settings.accumulation_steps} does not divide "
                f"config.{name}.batch_sequences, {settings.batch_sequences}"
            )
    if config.targets.minimum_probability * config.targets.k >= 1:
        raise ConfigError(
            f"config.targets.minimum_probability: {config.targets.minimum_probability} may drop every one of "
            f"config.targets.k = {config.targets.k} neighbors; expected less than {1 / config.targets.k:.3g}"
        )
    keys_from_base = base.source == "train" and not config.datastore.key_model
    if keys_from_base and config.targets.search_dimensions >= base.width:
        raise ConfigError(
            f"config.targets.search_dimensions: expected fewer than the {base.width} dimensions of the keys "
            f"(config.base.width), or 0 for all, found {config.targets.search_dimensions}"
        )
    if config.memory.output_from_base and base.source == "train" and config.memory.width != base.width:
        raise ConfigError(
            f"config.memory.output_from_base: needs config.memory.width ({config.memory.width}) equal to the base's "
            f"width ({base.width})"
        )


def _check_outside(workdir: str, key: str, corpus: str) -> None:
    """Refuses a working directory in the folder of the corpus, which would contain the artifacts made from it."""
    if "://" in workdir or "://" in corpus:
        path, folder = (os.path.normpath(name) for name in (workdir, corpus))
    else:
        path, folder = os.path.realpath(workdir), os.path.realpath(corpus)
    if not corpus or (path != folder and not path.startswith(f"{folder.rstrip('/')}/")):
        return
    below = os.path.relpath(path, folder)
    if below == "." or not any(part.startswith(".") for part in below.split("/")):  # hidden folders are not read
        raise ConfigError(
            f"config.workdir: {workdir} is in the folder of config.{key}, {corpus}, so that its files would be read as "
            "text of the corpus; choose a folder elsewhere"
        )


def check_profile(key: str, text: str, steps: int) -> None:
    """Refuses a `profile_steps` beyond the end of a run of `steps`; 0 steps = not known yet.

    Raises:
      ConfigError: names the key and the last step.
    """
    if 0 < steps < profiled_steps(text).stop - 1:
        raise ConfigError(f"{key}: {text!r} ends after the last step of the run, {steps}")


def mesh_rules(config: ml_collections.ConfigDict) -> dict[str, str | tuple[str, ...] | None]:
    """The table of config.mesh.rules in the form that `core.sharding.Sharding` expects."""
    rules: dict[str, str | tuple[str, ...] | None] = {"layers": None, "position": None}
    for logical, text in config.mesh.rules.items():
        axes = tuple(axis for axis in text.split("+") if axis)
        rules[logical] = axes if len(axes) > 1 else axes[0] if axes else None
    return rules


def as_axes(rule: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in a rule of that table, or in an entry of a PartitionSpec."""
    return (rule,) if isinstance(rule, str) else tuple(rule or ())


def plain_dict(group: ml_collections.ConfigDict) -> dict:
    """A group as JSON-serializable dictionaries, as stored in manifests."""
    return json.loads(group.to_json_best_effort())


def as_config_file(config: ml_collections.ConfigDict, note: str) -> str:
    """A resolved config as a self-contained config file, starting with the note."""
    values = pprint.pformat(config.to_dict(), width=100, sort_dicts=False)
    return (
        f"{note!r}\nfrom ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict(\n{values}\n    )\n"
    )
