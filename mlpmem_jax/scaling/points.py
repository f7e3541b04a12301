"""Reads and checks the points of a sweep, one CSV row per trained model, before anything is fitted."""

from __future__ import annotations

import csv
import dataclasses
import io
import math

import numpy as np
from etils import epath

from mlpmem_jax.core.errors import UserError

COLUMNS = ("arm", "parameters", "tokens", "flops", "perplexity", "seed")
LEAST_SIZES = 3
FILE = "points.csv"
SAME_BUDGET = 1.1  # budgets are rounded to whole optimizer steps; runs within this factor of compute share one


@dataclasses.dataclass(frozen=True)
class Runs:
    """The R runs of one arm; all seeds of the same size and training budget count as one run.

    Attributes:
      parameters_R: total parameters.
      tokens_R: training tokens.
      flops_R: training compute, floating-point operations.
      losses_R: mean over seeds of log perplexity, nats per token.
      seeds_R: number of seeds.
      squares_R: sum over seeds of squared deviations from losses_R.
    """

    parameters_R: np.ndarray
    tokens_R: np.ndarray
    flops_R: np.ndarray
    losses_R: np.ndarray
    seeds_R: np.ndarray
    squares_R: np.ndarray

    def __len__(self) -> int:
        return len(self.losses_R)

    def take(self, rows) -> Runs:
        """The runs at the given rows, an index array or a mask."""
        fields = {field.name: getattr(self, field.name)[rows] for field in dataclasses.fields(self)}
        return Runs(**fields)

    def budgets(self) -> np.ndarray:
        """Index of the training budget of each run, int [R], from 0 for the smallest compute."""
        order = np.argsort(self.flops_R, kind="stable")
        budgets_R, smallest, budget = np.empty(len(self), np.int64), -math.inf, -1
        for row in order:
            if self.flops_R[row] > SAME_BUDGET * smallest:
                smallest, budget = self.flops_R[row], budget + 1
            budgets_R[row] = budget
        return budgets_R

    def best(self, groups_R: np.ndarray) -> Runs:
        """The run with the lowest loss in each group, in the order of the groups' labels."""
        rows = [
            min(np.flatnonzero(groups_R == group), key=lambda row: self.losses_R[row]) for group in set_of(groups_R)
        ]
        return self.take(np.asarray(rows))


def set_of(values: np.ndarray) -> list:
    """The distinct values, in increasing order."""
    return np.unique(values).tolist()


@dataclasses.dataclass(frozen=True)
class PointSet:
    """A checked points file.

    Attributes:
      rows: number of points.
      corpus: the common corpus of all points; None if the file names none.
      arms: runs of every arm, in order of first appearance.
      points: arm -> (parameters, flops, perplexity) of its rows, unaveraged, float [N, 3].
    """

    rows: int
    corpus: str | None
    arms: dict[str, Runs]
    points: dict[str, np.ndarray]


def of_sweep(workdir) -> epath.Path:
    """The points file in the workdir of a sweep.

    Raises:
      UserError: the sweep has not written one.
    """
    file = epath.Path(workdir) / FILE
    if not file.is_file():
        raise UserError(
            f"--runs={workdir}: has no {FILE}; expected the workdir of a sweep for which mlpmem sweep has finished"
        )
    return file


def read(points_csv, against: str = "parameters") -> PointSet:
    """Reads and checks a CSV file of points.

    Args:
      points_csv: any path that etils.epath opens. The header must name the columns arm, parameters, tokens, flops,
        perplexity and seed, in any order, and may name corpus; other columns are ignored.
      against: "parameters" or "flops", what the power law will be fitted against.

    Returns:
      The points, with the seeds of each run averaged.

    Raises:
      UserError: the file is missing or empty, lacks a column, has an invalid value (not a number, not positive), mixes
        corpora, repeats a point, or has an arm with fewer than three sizes (or budgets).
    """
    path = epath.Path(points_csv)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a CSV file of points with the columns {', '.join(COLUMNS)}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error}); expected CSV") from error
    try:
        rows = _rows(str(path), text)
    except csv.Error as error:  # a cell of more than 128 kB, for example
        raise UserError(f"{path}: expected CSV: {error}") from error
    corpora = {}
    for line, row in rows:
        corpora.setdefault(row["corpus"], line)
    if len(corpora) > 1:
        (a, first), (b, second) = list(corpora.items())[:2]
        raise UserError(
            f"{path}: column 'corpus' is {a!r} in row {first} and {b!r} in row {second}; perplexities of "
            "different corpora do not follow one law: fit a separate file for each corpus"
        )
    _refuse_repeated(str(path), rows)
    arms, points = {}, {}
    for name in dict.fromkeys(row["arm"] for _, row in rows):
        of_arm = [row for _, row in rows if row["arm"] == name]
        arms[name] = _gather(of_arm)
        points[name] = np.array([[row["parameters"], row["flops"], row["perplexity"]] for row in of_arm])
        _refuse_few(str(path), name, arms[name], against)
    return PointSet(len(rows), next(iter(corpora)), arms, points)


def _rows(path: str, text: str) -> list[tuple[int, dict]]:
    """Every row with its line number in the file, each value converted and checked."""
    reader = csv.reader(io.StringIO(text))
    header = [name.strip() for name in next(reader, [])]
    lacking = [name for name in COLUMNS if name not in header]
    if lacking:
        raise UserError(
            f"{path}: row 1 lacks the column{'s' * (len(lacking) > 1)} {', '.join(lacking)}; it names "
            f"{', '.join(filter(None, header)) or 'nothing'}; expected {', '.join(COLUMNS)}"
        )
    repeated = [name for name in (*COLUMNS, "corpus") if header.count(name) > 1]
    if repeated:
        raise UserError(f"{path}: row 1 names the column {repeated[0]!r} twice; remove one")
    rows = []
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise UserError(f"{path}: row {reader.line_num} has {len(cells)} cells but the header has {len(header)}")
        cells = dict(zip(header, (cell.strip() for cell in cells), strict=True))
        row = {name: _value(path, reader.line_num, name, cells[name]) for name in COLUMNS}
        rows.append((reader.line_num, row | {"corpus": cells.get("corpus")}))
    if not rows:
        raise UserError(f"{path}: no points below the header; expected one row per trained model")
    return rows


def _value(path: str, line: int, column: str, text: str) -> str | int | float:
    """One cell converted, or an error that names its row and column."""
    cell = f"{path}: row {line}, column {column!r} is {text!r}"
    if column == "arm":
        if not text:
            raise UserError(
                f"{path}: row {line}, column 'arm' is empty; expected a name such as continued or augmented"
            )
        return text
    try:
        value = int(text) if column == "seed" else float(text)
    except ValueError:
        raise UserError(f"{cell}; expected {'a whole number' if column == 'seed' else 'a number'}") from None
    if column != "seed" and not 0.0 < value < math.inf:
        advice = ": remove runs that diverged" if column == "perplexity" else ""
        raise UserError(f"{cell}; expected a finite number above 0{advice}")
    return value


def _refuse_repeated(path: str, rows: list[tuple[int, dict]]) -> None:
    seen = {}
    for line, row in rows:
        point = tuple(row[name] for name in ("arm", "parameters", "tokens", "flops", "seed"))
        if point in seen:
            raise UserError(
                f"{path}: rows {seen[point]} and {line} are the same point (columns arm, parameters, tokens, flops and "
                "seed agree); remove one, or give repeated runs different seeds"
            )
        seen[point] = line


def _refuse_few(path: str, arm: str, runs: Runs, against: str) -> None:
    """Refuses arms with fewer than three sizes (or budgets), which any line would fit."""
    if against == "flops":
        values, what = [float(np.min(runs.flops_R[runs.budgets() == b])) for b in set_of(runs.budgets())], "budgets"
        advice = f"column 'flops'; values within a factor {SAME_BUDGET:g} are one budget"
    else:
        values, what, advice = set_of(runs.parameters_R), "sizes", "column 'parameters'"
        if len(set_of(runs.budgets())) >= LEAST_SIZES:
            advice += "; it has enough budgets for a law in compute, against='flops'"
    if len(values) < LEAST_SIZES:
        listed = ", ".join(f"{value:.6g}" for value in values)
        raise UserError(
            f"{path}: arm {arm!r} has too few {what}: {listed}; "
            f"a power law needs at least {LEAST_SIZES} different ones ({advice})"
        )


def _gather(rows: list[dict]) -> Runs:
    """Averages the seeds of every run of one arm."""
    seeds = {}
    for row in rows:
        seeds.setdefault((row["parameters"], row["tokens"], row["flops"]), []).append(math.log(row["perplexity"]))
    keys = sorted(seeds)
    losses_R = np.array([np.mean(seeds[key]) for key in keys])
    squares_R = np.array(
        [np.sum(np.square(np.array(seeds[key]) - loss)) for key, loss in zip(keys, losses_R, strict=True)]
    )
    parameters_R, tokens_R, flops_R = np.array(keys).T
    return Runs(parameters_R, tokens_R, flops_R, losses_R, np.array([len(seeds[key]) for key in keys]), squares_R)
