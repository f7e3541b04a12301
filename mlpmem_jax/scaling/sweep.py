"""`mlpmem sweep`: trains many models over size, compute and arm, at equal budgets from shared artifacts.

This module turns a sweep file (see configs/sweeps) into checked points, before any compute; `tasks` finds what they
share, `runner` runs it on this machine, `launching` writes jobs for others, `collection` writes points.csv.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence

import ml_collections
from etils import epath

from mlpmem_jax.core import config_files
from mlpmem_jax.core.config import check_config, plain_dict
from mlpmem_jax.core.errors import ConfigError, UserError
from mlpmem_jax.scaling import budgets

ARMS = ("continued", "augmented")
_KEYS = ("config", "counted", "positions", "points")
_POINT_KEYS = ("name", "arm", "flops", "seed", "variant", "overrides")
_LONGEST_NAME = 36  # what Kubernetes' limit on job names leaves
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


@dataclasses.dataclass(frozen=True)
class Point:
    """One trained model of a sweep.

    Attributes:
      name: name of the point and its folder.
      arm: one of ARMS.
      variant: a label for other differences from the arm's points; "" = none.
      seed: random seed of the arm's training.
      flops: its budget.
      config: its resolved config, with the steps that the budget pays for and its own workdir.
    """

    name: str
    arm: str
    variant: str
    seed: int
    flops: float
    config: ml_collections.ConfigDict

    @property
    def label(self) -> str:
        """The arm's name in points.csv."""
        return f"{self.arm} {self.variant}".strip()


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A checked sweep.

    Attributes:
      name: the sweep file's name, without ".py".
      workdir: folder of all results.
      counted: one of budgets.COUNTED.
      points: the points, in the order of the file.
    """

    name: str
    workdir: str
    counted: str
    points: tuple[Point, ...]


def read(file: str, overrides: Sequence[str] = ()) -> Sweep:
    """Reads and checks a sweep file.

    Args:
      file: a Python file with `get_sweep()`.
      overrides: `--config.key=value`, applied to the config that the points start from.

    Raises:
      ConfigError: the file cannot be read; a point's name, key or value is invalid; two points have the same name;
        points use different corpora; a budget is too small for one step.
    """
    fields_by_key = _load(file)
    base = config_files.override(file, fields_by_key["config"], overrides)
    if fields_by_key["counted"] not in budgets.COUNTED:
        allowed = " or ".join(map(repr, budgets.COUNTED))
        raise ConfigError(f"{file}: counted: expected {allowed}, found {fields_by_key['counted']!r}")
    counts_targets = fields_by_key["counted"] == budgets.COUNTED[1]
    positions = fields_by_key["positions"]
    if counts_targets and (type(positions) is not int or positions < 1):
        raise ConfigError(
            f"{file}: positions: expected the number of training positions, from which the cost of the targets "
            f"({fields_by_key['counted']!r}) is computed, found {positions!r}"
        )
    if not isinstance(fields_by_key["points"], list | tuple) or not fields_by_key["points"]:
        raise ConfigError(
            f"{file}: points: expected a list of at least one point, found {fields_by_key['points']!r:.80}"
        )
    points, names = [], set()
    for number, fields in enumerate(fields_by_key["points"], start=1):
        _check_fields(f"{file}: point {number}", fields)
        if fields["name"] in names:
            raise ConfigError(f"{file}: two points have the name {fields['name']!r}; give each its own name")
        names.add(fields["name"])
        try:
            points.append(_resolved(base, fields, positions if counts_targets else 0))
        except (UserError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"{file}: point {fields['name']!r}: {error}") from error
    for point in points[1:]:
        _refuse_other_corpus(file, points[0], point)
    return Sweep(os.path.basename(file).removesuffix(".py"), base.workdir, fields_by_key["counted"], tuple(points))


def _load(file: str) -> dict:
    loaded = config_files.load(file, "get_sweep")
    if not isinstance(loaded, Mapping) or sorted(loaded) != sorted(_KEYS):
        keys = sorted(loaded) if isinstance(loaded, Mapping) else type(loaded).__name__
        raise ConfigError(f"{file}: get_sweep(): expected a dictionary with the keys {', '.join(_KEYS)}, found {keys}")
    return dict(loaded)


def _check_fields(where: str, fields: Mapping) -> None:
    if not isinstance(fields, Mapping) or {*fields} != {*_POINT_KEYS}:
        found = ", ".join(map(str, fields)) if isinstance(fields, Mapping) else repr(fields)
        raise ConfigError(f"{where}: expected the keys {', '.join(_POINT_KEYS)}, found {found}")
    name, budget = fields["name"], fields["flops"]
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        raise ConfigError(
            f"{where}: name: expected lowercase letters, digits and '-', first a letter, last not '-', "
            f"at most {_LONGEST_NAME} characters, found {name!r}"
        )
    if fields["arm"] not in ARMS:
        raise ConfigError(f"{where} {name!r}: arm: expected {' or '.join(map(repr, ARMS))}, found {fields['arm']!r}")
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget < float("inf"):
        raise ConfigError(f"{where} {name!r}: flops: expected a number above 0, found {budget!r}")


def _resolved(base: ml_collections.ConfigDict, fields: Mapping, positions: int) -> Point:
    """A point with its complete config; `positions` is 0 if the budget does not include targets."""
    config = ml_collections.ConfigDict(base.to_dict())
    config.update_from_flattened_dict({"training.seed": fields["seed"], **fields["overrides"]})
    config.workdir = str(epath.Path(base.workdir) / "points" / fields["name"])
    warmup = config.training.warmup_steps
    config.training.update({"steps": 1, "warmup_steps": 0})  # set below, once the budget is converted to steps
    check_config(config)
    pays_for_targets = positions and fields["arm"] == "augmented"
    first = budgets.planned_construction(config, positions) if pays_for_targets else 0.0
    config.training.steps = budgets.steps(fields["arm"], config, fields["flops"], first)
    config.training.warmup_steps = min(warmup, config.training.steps // 10)
    return Point(fields["name"], fields["arm"], fields["variant"], fields["seed"], float(fields["flops"]), config)


def _refuse_other_corpus(file: str, point: Point, other: Point) -> None:
    for group in ("corpus", "tokenizer"):
        here, there = plain_dict(point.config[group]), plain_dict(other.config[group])
        for key in here:
            if here[key] != there[key]:
                raise ConfigError(
                    f"{file}: config.{group}.{key} is {here[key]!r} in point {point.name!r} and {there[key]!r} in "
                    f"point {other.name!r}; perplexities of different corpora share no law: make one sweep each"
                )
