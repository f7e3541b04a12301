"""`mlpmem fit`: fits scaling laws with intervals to the points of a sweep (fit.json and plots)."""

from __future__ import annotations

import json

from etils import epath

from mlpmem_jax.core.errors import UserError
from mlpmem_jax.core.progress import say
from mlpmem_jax.scaling import bootstrap, chinchilla, exponents, figure, frontier, points, power_law

INTERVALS = (
    "studentized parametric bootstrap over sizes: the seeds of a run are averaged; sweeps are simulated from the "
    "fitted law with normal noise on log perplexity, one value per size, with a scale drawn for each sweep from the "
    "chi-square law of the scatter around the fit; every simulated sweep is refitted and percentiles are taken"
)


def run(
    points_csv,
    output_dir,
    *,
    against: str = "parameters",
    confidence: float = 0.95,
    samples: int = 40_000,
    seed: int = 0,
) -> dict:
    """Fits the laws of every arm, compares the arms, and writes fit.json, fit.svg and fit.png.

    Also writes frontier.svg and frontier.png if training budgets were spent on several sizes.

    Args:
      points_csv: CSV file with the columns of `points.COLUMNS`.
      output_dir: folder for the results, created if missing.
      against: "parameters" for PPL = (beta N)^gamma, "flops" for the same law in training compute, for sweeps of one
        size over several budgets.
      confidence: confidence level of the intervals, between 0 and 1.
      samples: bootstrap replicates for the intervals.
      seed: random seed of the replicates; the same points and seed give the same bytes.

    Returns:
      The contents of fit.json.

    Raises:
      UserError: an argument is invalid or the points cannot be fitted; then nothing is written.
    """
    if against not in ("parameters", "flops"):
        raise UserError(f"against={against!r}: expected 'parameters' or 'flops'")
    if not 0.0 < confidence < 1.0:
        raise UserError(f"confidence={confidence}: expected a number between 0 and 1, for example 0.95")
    if samples < (least := round(20 / (1.0 - confidence))):
        raise UserError(
            f"samples={samples}: an interval of {100 * confidence:g} % needs at least {least} bootstrap replicates"
        )
    point_set = points.read(points_csv, against)
    fitted, laws = fit(point_set, against=against, confidence=confidence, samples=samples, seed=seed)
    folder = epath.Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = figure.pictures(fitted, laws, point_set)
    encoded = json.dumps(fitted, indent=1, allow_nan=False) + "\n"
    for name, content in {**pictures, "fit.json": encoded.encode()}.items():
        partial = folder / f"{name}.partial"
        partial.write_bytes(content)
        partial.replace(folder / name)
    for name in figure.FILES:
        if name not in pictures:
            (folder / name).unlink(missing_ok=True)  # left over from an earlier fit of other points
    say(fitted["comparison"]["verdict"] if fitted["comparison"] else "There is only one arm: nothing to compare.")
    return fitted


def fit(
    point_set: points.PointSet, *, against: str, confidence: float, samples: int, seed: int
) -> tuple[dict, dict[str, power_law.PowerLaw]]:
    """All fits of a sweep: the contents of fit.json, and the power law of each arm."""
    options = {"confidence": confidence, "samples": samples}
    laws, arms = {}, {}
    for name, runs in point_set.arms.items():
        laws[name] = power_law.fit(
            runs, against=against, samples=samples, generator=bootstrap.generator_of(seed, name, "power_law")
        )
        arms[name] = {"power_law": power_law.summary(laws[name], confidence), "chinchilla": None}
        if reason := chinchilla.absent(runs):
            arms[name]["chinchilla_absent"] = reason
        else:
            generator = bootstrap.generator_of(seed, name, "chinchilla")
            arms[name]["chinchilla"] = chinchilla.fit(runs, **options, generator=generator)
        arms[name]["frontier"] = {
            kind.__name__: kind(runs, **options, generator=bootstrap.generator_of(seed, name, kind.__name__))
            for kind in (frontier.envelope, frontier.isoflop)
        }
    comparisons = [
        exponents.compare((first, laws[first]), (second, laws[second]), against=against, confidence=confidence)
        for first, second in exponents.pairs(list(laws))
    ]
    fitted = {
        "against": against,
        "corpus": point_set.corpus,
        "points": point_set.rows,
        "confidence": confidence,
        "intervals": INTERVALS,
        "samples": samples,
        "seed": seed,
        "arms": arms,
        "comparison": comparisons[0] if comparisons else None,
        "further_comparisons": comparisons[1:],
    }
    return fitted, laws
