"""Pictures of the fits: fit.* (laws and exponents) and frontier.* (what size to train for a given compute)."""

from __future__ import annotations

import io
import itertools
import math
import textwrap

import matplotlib
import matplotlib.axes
import matplotlib.figure
import matplotlib.ticker
import numpy as np

from mlpmem_jax.evaluation.figures import FAINT, INK, STYLE
from mlpmem_jax.evaluation.wording import label
from mlpmem_jax.scaling.points import PointSet, Runs, set_of
from mlpmem_jax.scaling.power_law import PowerLaw

FILES = ("fit.svg", "fit.png", "frontier.svg", "frontier.png")
# Okabe and Ito's colors, which color-blind readers tell apart; marker and line style carry the same distinction.
_KNOWN = {
    "continued": {"color": "#5f6b78", "marker": "s", "ls": "--"},
    "augmented": {"color": "#0072b2", "marker": "o", "ls": "-"},
}
_FURTHER = tuple(
    {"color": color, "marker": marker, "ls": dashes}
    for color, marker, dashes in zip(
        ("#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#000000"),
        "^DvPX*",
        ("-.", (0, (1, 1.2)), (0, (5, 1, 1, 1)), (0, (6, 2)), "--", "-."),
        strict=True,
    )
)
_STYLE = {**STYLE, "mathtext.default": "regular"}
_LEGEND = {"frameon": True, "framealpha": 0.85, "edgecolor": "none"}
_OUTSIDE = 100.0  # a log perplexity outside any plot that is still finite after exp
_AXIS_LABELS = {"parameters": "total parameters", "flops": "training compute (FLOPs)"}


def pictures(fitted: dict, laws: dict[str, PowerLaw], point_set: PointSet) -> dict[str, bytes]:
    """The image files, name -> content; the same fits give the same bytes."""
    styles = _styles(list(laws))
    with matplotlib.rc_context(_STYLE):
        drawn = {"fit": _laws(fitted, laws, point_set, styles)}
        if any("runs" in arm["frontier"]["envelope"] for arm in fitted["arms"].values()):
            drawn["frontier"] = _frontier(fitted, point_set, styles)
    files = {}
    for name, figure in drawn.items():
        for kind, metadata in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
            buffer = io.BytesIO()
            with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
                figure.savefig(buffer, format=kind, dpi=200, metadata=metadata)
            files[f"{name}.{kind}"] = buffer.getvalue()
    return files


def _styles(arms: list[str]) -> dict[str, dict]:
    """Color, marker and line style of each arm, known arms first."""
    further = itertools.cycle(_FURTHER)
    ordered = [arm for arm in _KNOWN if arm in arms] + [arm for arm in arms if arm not in _KNOWN]
    return {arm: _KNOWN[arm] if arm in _KNOWN else next(further) for arm in ordered}


def _laws(fitted: dict, laws: dict[str, PowerLaw], point_set: PointSet, styles: dict) -> matplotlib.figure.Figure:
    """Draws points, lines and bands on the left, exponents with their intervals on the right."""
    figure = matplotlib.figure.Figure(figsize=(10.4, 4.6))
    left, right = figure.subplots(1, 2, width_ratios=(1.75, 1.0))
    figure.get_layout_engine().set(wspace=0.05)
    column = 1 if fitted["against"] == "flops" else 0
    for arm in styles:
        law, style = laws[arm], styles[arm]
        line_Z = np.geomspace(law.x_R.min() / 1.15, law.x_R.max() * 1.15, 100)
        tail = (1.0 - fitted["confidence"]) / 2.0
        bounds_2xZ = np.quantile(law.drawn_losses(line_Z), [tail, 1.0 - tail], axis=0)
        low_Z, high_Z = np.exp(np.clip(bounds_2xZ, -_OUTSIDE, _OUTSIDE))
        left.fill_between(line_Z, low_Z, high_Z, color=style["color"], alpha=0.16, lw=0)
        left.plot(line_Z, np.exp(law.losses(line_Z)), color=style["color"], ls=style["ls"])
        points_Nx3, used = point_set.points[arm], np.exp(law.runs.losses_R)
        left.plot(points_Nx3[:, column], points_Nx3[:, 2], ".", ms=5, color=style["color"], alpha=0.55, mew=0)
        left.plot(law.x_R, used, style["marker"], ms=7, color=style["color"], mec="white", mew=0.9, zorder=4)
        left.plot(
            [], [], marker=style["marker"], color=style["color"], ls=style["ls"], ms=7, mec="white", label=_label(arm)
        )
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xlabel(_AXIS_LABELS[fitted["against"]])
    left.set_ylabel(_perplexity_label(fitted))
    _ticks(left.xaxis, left.get_xlim())
    # With few points, bands may be far wider than the points, so the points set the scale.
    losses = [np.log(points_Nx3[:, 2]) for points_Nx3 in point_set.points.values()]
    low, high = np.min(np.concatenate(losses)), np.max(np.concatenate(losses))
    margin = 0.14 * max(high - low, 0.05)
    above = margin if len(styles) < 4 else 0.075 * len(styles) * (high - low)  # room for a long legend
    left.set_ylim(math.exp(low - margin), math.exp(high + above))
    _ticks(left.yaxis, left.get_ylim())
    left.legend(loc="upper right", **_LEGEND)
    left.set_title(
        rf"$PPL = (\beta {'C' if column else 'N'})^\gamma$,  bands: {100 * fitted['confidence']:g} % intervals",
        loc="left",
        pad=10,
    )
    _draw_exponents(right, fitted, styles)
    if fitted["comparison"]:
        verdict = textwrap.fill(_plain(fitted["comparison"]["verdict"]), 140)
        figure.supxlabel(verdict, fontsize=9.5, x=0.012, ha="left", color=INK)
    return figure


def _draw_exponents(axes: matplotlib.axes.Axes, fitted: dict, styles: dict) -> None:
    """Draws gamma of each arm with its interval, and prints the numbers next to it."""
    values = []
    axes.grid(visible=False)
    for row, (arm, style) in enumerate(styles.items()):
        gamma = fitted["arms"][arm]["power_law"]["gamma"]
        values += list(gamma.values())
        axes.plot([gamma["low"], gamma["high"]], [row, row], color=style["color"], lw=2.2, solid_capstyle="butt")
        axes.plot(gamma["value"], row, style["marker"], ms=8, color=style["color"], mec="white", mew=0.9)
        value, low, high = (_signed(gamma[key]) for key in ("value", "low", "high"))
        text = rf"{_plain(arm)}   $\gamma$ = {value}   [{low}, {high}]"
        axes.annotate(text, (0.0, row), (0, 11), ("axes fraction", "data"), textcoords="offset points", fontsize=9.5)
    low, high = min(values), max(values)
    margin = 0.08 * max(high - low, 0.02)
    axes.set_xlim(low - margin, high + margin)
    axes.set_ylim(len(styles) - 0.5, -0.7)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    axes.set_xlabel(r"exponent $\gamma$, steeper to the left")
    if low - margin <= 0.0 <= high + margin:
        axes.axvline(0.0, color=FAINT, lw=1.0, ls=(0, (2, 2)), zorder=0.5)
    if comparison := fitted["comparison"]:
        ratio = comparison["gamma_ratio"]
        numbers = "unbounded"
        if ratio["low"] is not None:
            numbers = f"{ratio['value']:.2f}  [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        axes.set_title(f"ratio of exponents: {numbers}", loc="left", pad=10)


def _label(arm: str) -> str:
    """An arm's name in the points file, with a description if it is a known arm."""
    return _plain(arm if label(arm) == arm else f"{arm}: {label(arm)}")


def _perplexity_label(fitted: dict) -> str:
    return _plain(f"perplexity on {fitted['corpus']}" if fitted["corpus"] else "perplexity")


def _plain(text: str) -> str:
    """Escapes dollar signs, which would start math mode."""
    return text.replace("$", r"\$")


def _signed(value: float) -> str:
    return f"{value:.3f}".replace("-", "\N{MINUS SIGN}")


def _frontier(fitted: dict, point_set: PointSet, styles: dict) -> matplotlib.figure.Figure:
    """Draws perplexity by size at each training budget, one panel per arm, and the best size by compute."""
    figure = matplotlib.figure.Figure(figsize=(3.9 * (len(styles) + 1), 4.2))
    *panels, last = figure.subplots(1, len(styles) + 1)
    for axes, (arm, style) in zip(panels, styles.items(), strict=True):
        frontier, runs = fitted["arms"][arm]["frontier"], point_set.arms[arm]
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(_label(arm), loc="left", pad=8, color=style["color"], fontweight="bold")
        if "budgets" in frontier["isoflop"]:
            _draw_budgets(axes, frontier["isoflop"]["budgets"], runs)
        else:
            _draw_envelope(axes, frontier["envelope"].get("runs", []), runs)
        axes.set_xlim(axes.get_xlim()[0], axes.get_xlim()[1] * 8)  # room for the labels next to the last points
        _ticks(axes.xaxis, axes.get_xlim())
    limits = [limit for axes in panels for limit in axes.get_ylim()]
    for axes in panels:
        axes.set_ylim(min(limits), max(limits))
        _ticks(axes.yaxis, (min(limits), max(limits)))
    panels[0].set_ylabel(_perplexity_label(fitted))
    for arm, style in styles.items():
        _draw_optima(last, fitted["arms"][arm]["frontier"], arm, style)
    last.set_xscale("log")
    last.set_yscale("log")
    last.set_xlabel(_AXIS_LABELS["flops"])
    last.set_ylabel("best size (parameters)")
    last.set_title("compute-optimal size", loc="left", pad=8)
    _ticks(last.xaxis, last.get_xlim())
    _ticks(last.yaxis, last.get_ylim())
    last.legend(loc="lower right", **_LEGEND)
    return figure


def _draw_budgets(axes: matplotlib.axes.Axes, budgets: list[dict], runs: Runs) -> None:
    """Draws perplexity by size, one color per training budget, with its parabola and a diamond at the minimum."""
    groups_R, fitted = runs.budgets(), {budget["flops"]: budget for budget in budgets}
    colors = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.8, max(groups_R) + 1))
    for group, color in enumerate(colors):
        at_budget = runs.take(groups_R == group)
        flops, last = float(np.median(at_budget.flops_R)), int(np.argmax(at_budget.parameters_R))
        axes.plot(at_budget.parameters_R, np.exp(at_budget.losses_R), "o", ms=4.5, color=color)
        place = at_budget.parameters_R[last], np.exp(at_budget.losses_R[last])
        text = f"{flops:.2g} FLOPs".replace("e+", "e")
        axes.annotate(text, place, (5, 0), textcoords="offset points", fontsize=8, va="center")
        if flops not in fitted:
            continue
        budget = fitted[flops]
        line_Z = np.geomspace(budget["smallest"], budget["largest"], 60)
        losses_Z = np.polynomial.polynomial.polyval(np.log(line_Z / budget["center"]), budget["coefficients"])
        axes.plot(line_Z, np.exp(losses_Z), color=color, lw=1.4)
        if budget["inside"]:
            minimum = budget["parameters"]["value"], budget["perplexity"]["value"]
            axes.plot(*minimum, "D", ms=6, color=color, mec=INK, mew=0.9)
    axes.set_xlabel(_AXIS_LABELS["parameters"])


def _draw_envelope(axes: matplotlib.axes.Axes, envelope: list[dict], runs: Runs) -> None:
    """Draws perplexity by compute, one color per size, with the lower envelope in black."""
    sizes = set_of(runs.parameters_R)
    for size, color in zip(sizes, matplotlib.colormaps["viridis"](np.linspace(0.0, 0.8, len(sizes))), strict=True):
        of_size = runs.take(runs.parameters_R == size)
        of_size = of_size.take(np.argsort(of_size.flops_R))
        axes.plot(of_size.flops_R, np.exp(of_size.losses_R), "o-", ms=4.5, lw=1.2, color=color)
        place = of_size.flops_R[-1], np.exp(of_size.losses_R[-1])
        axes.annotate(_magnitude(size), place, (5, 2), textcoords="offset points", fontsize=8)
    best = [(run["flops"], run["perplexity"]) for run in envelope]
    axes.plot(*zip(*best, strict=True), "-", color=INK, lw=1.2, zorder=4)
    axes.set_xlabel(_AXIS_LABELS["flops"])


def _draw_optima(axes: matplotlib.axes.Axes, frontier: dict, arm: str, style: dict) -> None:
    """Draws the parabolas' minima with intervals and law, or if there are none, the runs of the lower envelope."""
    inside = [budget for budget in frontier["isoflop"].get("budgets", []) if budget["inside"]]
    exponents = frontier["isoflop"].get("exponents") if inside else frontier["envelope"].get("exponents")
    optima = inside or frontier["envelope"].get("runs", [])
    if not optima:
        return
    flops_R = np.array([optimum["flops"] for optimum in optima])
    sizes_R = np.array([_value(optimum["parameters"]) for optimum in optima])
    text = _label(arm)
    if exponents:
        exponent = exponents["optimal_parameters"]
        text += rf", $\propto C^{{{exponent['value']:.2f}}}$"
        line_Z = np.geomspace(flops_R.min(), flops_R.max(), 2)
        center = np.exp(np.mean(np.log(sizes_R))), np.exp(np.mean(np.log(flops_R)))
        axes.plot(line_Z, center[0] * (line_Z / center[1]) ** exponent["value"], color=style["color"], ls=style["ls"])
    axes.plot(flops_R, sizes_R, style["marker"], color=style["color"], mec="white", ms=7, label=text, zorder=4)
    for optimum in inside:
        low, high = optimum["parameters"]["low"], optimum["parameters"]["high"]
        if low and high:
            axes.plot([optimum["flops"]] * 2, [low, high], color=style["color"], lw=1.2)


def _value(estimate: dict | float) -> float:
    return estimate["value"] if isinstance(estimate, dict) else estimate


def _ticks(axis: matplotlib.axis.Axis, limits: tuple[float, float]) -> None:
    """Puts a few plain, round ticks on a logarithmic axis, even if it spans less than a decade."""
    least = 3 if limits[0] >= 1e13 else 4  # powers of ten take more room
    exponents = range(math.floor(math.log10(limits[0])), math.ceil(math.log10(limits[1])) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [digit * 10.0**exponent for exponent in exponents for digit in digits]
        ticks = [tick for tick in ticks if limits[0] <= tick <= limits[1]]
        if len(ticks) >= least:
            break
    enough = len(ticks) >= least
    axis.set_major_locator(
        matplotlib.ticker.FixedLocator(ticks) if enough else matplotlib.ticker.MaxNLocator(6, steps=[1, 2, 5, 10])
    )
    axis.set_major_formatter(matplotlib.ticker.FuncFormatter(_magnitude))
    axis.set_minor_locator(matplotlib.ticker.NullLocator())


def _magnitude(value: float, _position: int | None = None) -> str:
    """A tick label: 124M, 1.5B; powers of ten for larger values, plain numbers for smaller ones."""
    if value >= 1e13:
        exponent = math.floor(math.log10(value) + 1e-9)
        digits = value / 10**exponent
        return f"$10^{{{exponent}}}$" if abs(digits - 1) < 1e-6 else f"${digits:.2g}·10^{{{exponent}}}$"
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.4g}"
