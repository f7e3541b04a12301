"""The report's plots, drawn from the values of metrics.json only.

Colors are Okabe and Ito's, which color-blind readers tell apart; line style and marker carry the same distinction.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Iterator

import matplotlib
import matplotlib.axes
import matplotlib.figure
import matplotlib.ticker

INK, FAINT, GRID = "#1f2933", "#6b7785", "#dde2e7"
COLORS = {
    "base": "#5f6b78",
    "memory": "#56b4e9",
    "knn_lm": "#e69f00",
    "knn": "#e69f00",
    "augmented": "#0072b2",
}
CONTROL_COLOR = "#a9b3bd"
MARKERS = {"base": "s", "knn": "^", "memory": "D", "augmented": "o"}
LABELS = {
    "base": "base LM",
    "memory": "memory alone",
    "knn_lm": "base + kNN",
    "knn": "kNN",
    "augmented": "base + memory",
    "continued": "base, more training",
    "ce_only": "base + memory,\nno kNN targets",
}
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.9,
    "svg.fonttype": "path",
    "figure.constrained_layout.use": True,
}
WIDTH = 5.4  # inches: legible on a phone, and two fit side by side on a page


@contextlib.contextmanager
def _figure(width: float, height: float, columns: int = 1, **options) -> Iterator[tuple]:
    """A figure and its row of axes, in the report's style."""
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(width, height))
        yield figure, figure.subplots(1, columns, squeeze=False, **options)[0]


def svg(figure: matplotlib.figure.Figure, name: str) -> str:
    """The figure as one <svg> element that may share a page with others; the same figure gives the same text.

    `name` prefixes every id in it.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg ([^>]*?)width="[\d.]+pt" height="[\d.]+pt"|<svg height="[\d.]+pt" ', r"<svg \1", text, count=1)
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)


def _png(figure: matplotlib.figure.Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()


def perplexities(metrics: dict) -> matplotlib.figure.Figure:
    """Test perplexity of every system, with the interval of its ratio to the base."""
    rows = len(_systems(metrics))
    with _figure(WIDTH, 0.95 + 0.47 * rows) as (figure, (axes,)):
        draw_perplexities(axes, metrics)
        return figure


def weights(metrics: dict) -> matplotlib.figure.Figure:
    """Perplexity by interpolation weight."""
    with _figure(WIDTH, 3.4) as (figure, (axes,)):
        draw_weights(axes, metrics)
        return figure


def overview(metrics: dict) -> bytes:
    """Perplexities and weights side by side, as a PNG."""
    with _figure(10.8, 3.5, columns=2, width_ratios=(1.12, 1.0)) as (figure, (left, right)):
        draw_perplexities(left, metrics)
        draw_weights(right, metrics)
        left.set_title("test perplexity", loc="left", pad=12)
        figure.get_layout_engine().set(wspace=0.06)
        return _png(figure)


def draw_perplexities(axes: matplotlib.axes.Axes, metrics: dict) -> None:
    """Draws horizontal bars from zero, with ratios in a column; bars are clipped at 1.6 times the base."""
    systems = _systems(metrics)
    base = systems["base"][0]
    limit = max([base, *(value for value, _ in systems.values() if value <= 1.6 * base)]) * 1.03
    axes.axvline(base, color=FAINT, lw=1.0, ls=(0, (2, 2)), zorder=0.5)
    for row, (name, (value, interval)) in enumerate(systems.items()):
        axes.barh(row, min(value, limit), height=0.68, color=COLORS.get(name, CONTROL_COLOR))
        weight = "bold" if name == "augmented" else "normal"
        ink = "white" if name in ("base", "augmented") else INK
        inside = f"{value:,.2f}" if value < 100 else f"{value:,.1f}"
        inside += "  →" if value > limit else ""
        axes.text(0.02 * limit, row, inside, va="center", color=ink, fontweight=weight)
        if interval is None:
            continue
        low, high = interval
        if value <= limit:
            spread = [[max(value - low * base, 0)], [max(high * base - value, 0)]]
            axes.errorbar(value, row, xerr=spread, color=INK, capsize=3, lw=1.2)
        ratio = f"{value / base:.3f}   {low:.3f} to {high:.3f}"
        axes.text(1.04 * limit, row, ratio, va="center", fontsize=9.5, fontweight=weight)
    heading = f"ratio   {100 * metrics['confidence']:g} % interval"
    axes.text(1.04 * limit, 0, heading, va="center", fontsize=9.5, color=FAINT)
    axes.set_yticks(range(len(systems)), [LABELS.get(name, name) for name in systems])
    axes.set_ylim(len(systems) - 0.5, -0.5)
    axes.set_xlim(0, limit * 1.72)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_xticks(matplotlib.ticker.MaxNLocator(4).tick_values(0, base)[:-1])
    axes.spines["bottom"].set_visible(False)


def draw_weights(axes: matplotlib.axes.Axes, metrics: dict) -> None:
    """Draws one color per system, solid for test and dashed for validation, with a dot at the chosen weight."""
    curves, finite = metrics["curves"], []
    for name, system in (("memory", "augmented"), ("knn_lm", "knn_lm")):
        color, chosen = COLORS[system], metrics["interpolation_weight"][name]
        for split, dashes in (("validation", (0, (4, 2))), ("test", "-")):
            values = [math.nan if value is None else value for value in curves[split][name]]
            label = LABELS[system] if split == "test" else None
            axes.plot(curves["weights"], values, color=color, ls=dashes, label=label, lw=2.0 if label else 1.4)
            best = metrics["perplexity"][split][system]
            face = color if split == "test" else "white"
            axes.plot([chosen], [best], "o", ms=6, color=color, markerfacecolor=face, zorder=4)
            finite += [best, values[0]]
    axes.plot([], [], color=FAINT, ls=(0, (4, 2)), lw=1.4, label="on validation")
    axes.plot([], [], "o", color=FAINT, ms=6, label="λ chosen on validation")
    low, high = min(finite), max(finite)
    margin = max(high - low, 0.02 * high)
    axes.set_ylim(low - 0.12 * margin, high + 0.25 * margin)
    axes.set_xlim(0, 1)
    axes.set_xlabel("interpolation weight λ (0 = base alone)")
    axes.set_ylabel("perplexity")
    _legend_above(axes)


def training(metrics: dict) -> dict[str, matplotlib.figure.Figure]:
    """Losses of the memory, and validation perplexities of the memory and of the base, if recorded."""
    figures = {}
    memory, base = metrics["training"].get("memory", []), metrics["training"].get("base", [])
    losses = {"cross_entropy": "cross entropy", "kl": "KL from kNN", "loss": "loss (weighted sum)"}
    colors = {"loss": INK, "kl": COLORS["knn"], "cross_entropy": COLORS["memory"]}
    if any("loss" in record for record in memory):
        with _figure(WIDTH, 3.4) as (figures["memory_losses"], (axes,)):
            for name, label in losses.items():
                _draw_records(axes, memory, name, color=colors[name], label=label, lw=1.4)
            axes.set_ylabel("nats per position")
            _legend_above(axes)
    if any("validation/perplexity" in record for record in memory):
        figures["memory_validation"] = _memory_validation(memory, metrics["perplexity"]["validation"]["base"])
    if any("validation/perplexity" in record for record in base):
        with _figure(WIDTH, 3.4) as (figures["base_validation"], (axes,)):
            _draw_records(axes, base, "validation/perplexity", color=COLORS["base"], marker="o", ms=4)
            axes.set_ylabel("validation perplexity of the base")
            axes.set_yscale("log")
            _plain_logarithmic_ticks(axes)
    return figures


def _memory_validation(records: list[dict], base: float) -> matplotlib.figure.Figure:
    """The mixture and the base below; above them, on a separate scale, the memory alone."""
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(WIDTH, 3.4))
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.5))
        style = {"marker": "o", "ms": 4}
        _draw_records(above, records, "validation/perplexity_memory", color=COLORS["memory"], **style)
        _draw_records(below, records, "validation/perplexity", color=COLORS["augmented"], **style)
        below.axhline(base, color=COLORS["base"], ls=(0, (2, 2)), lw=1.4)
        below.margins(y=0.2)
        above.set_xlabel("")
        for axes, title in ((above, "memory alone"), (below, "base + memory; dashed: base")):
            axes.set_title(title, loc="left", fontsize=9.5)
            axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
        figure.supylabel("validation perplexity", fontsize=10.5)
        return figure


def _draw_records(axes: matplotlib.axes.Axes, records: list[dict], name: str, **style) -> None:
    points = [(record["step"], record[name]) for record in records if name in record]
    axes.plot(*zip(*points, strict=True), **style) if points else axes.set_visible(False)
    axes.set_xlabel("optimizer step")
    axes.set_xlim(left=0)


def shapes(metrics: dict) -> dict[str, matplotlib.figure.Figure]:
    """For each distribution: tokens above each threshold, and tokens that hold a given share of the mass."""
    figures = {}
    for kind in ("tokens_above", "tokens_for_mass"):
        with _figure(WIDTH, 3.4) as (figures[kind], (axes,)):
            for name, table in metrics["sharpness"].items():
                # Zeros cannot be drawn on logarithmic axes.
                points = [(float(at), count or math.nan) for at, count in table[kind].items() if float(at) > 0]
                style = {"color": COLORS[name], "marker": MARKERS[name], "ms": 5, "label": LABELS[name]}
                axes.plot(*zip(*points, strict=True), **style)
            axes.set_yscale("log")
            _plain_logarithmic_ticks(axes)
            if kind == "tokens_above":
                axes.set_xscale("log")
                axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
                axes.invert_xaxis()
                axes.set_xlabel("probability threshold")
                axes.set_ylabel("tokens above it")
            else:
                axes.set_xticks(masses := [mass for mass, _ in points], [f"{100 * mass:g} %" for mass in masses])
                axes.set_xlabel("share of the mass")
                axes.set_ylabel("tokens that hold it")
            _legend_above(axes)
    return figures


BREAKDOWNS = {
    "token_count": "occurrences of the next token",
    "context_count": "occurrences of the 4 tokens before it",
    "base_entropy": "entropy of the base, nats",
}
"""What positions are grouped by, for axes and captions."""


def breakdowns(metrics: dict) -> dict[str, matplotlib.figure.Figure]:
    """Plots of the gain over the base, for each way of grouping positions."""
    figures = {}
    for name in BREAKDOWNS:
        with _figure(WIDTH, 3.4) as (figures[name], (axes,)):
            draw_breakdown(axes, metrics, name)
            _legend_above(axes)
    return figures


def breakdown_overview(metrics: dict) -> bytes:
    """These plots side by side, as a PNG."""
    with _figure(3 * WIDTH, 3.6, columns=3) as (figure, row):
        for axes, name in zip(row, BREAKDOWNS, strict=True):
            draw_breakdown(axes, metrics, name)
        _legend_above(row[0])
        return _png(figure)


def draw_breakdown(axes: matplotlib.axes.Axes, metrics: dict, name: str) -> None:
    """Draws bars of memory and search for each bin, labeled with the bin's share of tokens."""
    rows = metrics["breakdown"][name]
    gains = []
    for place, system in ((-0.2, "augmented"), (0.2, "knn_lm")):
        heights = [row["gain"][system] for row in rows]
        bounds = [row["interval"][system] or (height, height) for row, height in zip(rows, heights, strict=True)]
        spread = [[max(height - low, 0) for (low, _), height in zip(bounds, heights, strict=True)]]
        spread += [[max(high - height, 0) for (_, high), height in zip(bounds, heights, strict=True)]]
        at = [index + place for index in range(len(rows))]
        axes.bar(at, heights, width=0.38, color=COLORS[system], label=LABELS[system])
        axes.errorbar(at, heights, yerr=spread, fmt="none", color=INK, capsize=2, lw=1.0)
        gains += heights
    low, high = min(0.0, *gains), max(0.0, *gains)
    margin = 0.3 * max(high - low, 1e-3)
    # With few documents, intervals may be much wider than the bars, so they are clipped.
    axes.set_ylim(low - margin * (low < 0), high + margin)
    axes.axhline(0, color=FAINT, lw=0.8)
    labels = [f"{bin_label(row, name)}\n{100 * row['share_of_positions']:.0f} %" for row in rows]
    axes.set_xticks(range(len(rows)), labels, fontsize=8.5)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel(BREAKDOWNS[name] + " (and share of tokens)")
    axes.set_ylabel("gain over the base, nats per token")


def bin_label(row: dict, name: str) -> str:
    """A short label of a breakdown's bin."""

    def short(value: float) -> str:
        return f"{value // 1000:g}k" if value >= 1000 else f"{value:g}"

    first, below = row["from"], row["below"]
    if below is None:
        return f"≥ {short(first)}"
    last = below - 1 if name != "base_entropy" and below <= 1000 else below  # counts are whole numbers
    return short(first) if last == first else f"{short(first)}-{short(last)}"


def _systems(metrics: dict) -> dict[str, tuple[float, list[float] | None]]:
    """Test perplexity of each system, and interval of its ratio to the base, in drawing order."""
    intervals, of = metrics["interval"]["test"], metrics["perplexity"]["test"]
    controls = {name: control["perplexity"]["test"] for name, control in metrics["controls"].items()}
    ordered = {"base": of["base"], "augmented": of["augmented"], "knn_lm": of["knn_lm"], **controls}
    ordered["memory"] = of["memory"]
    return {name: (value, intervals.get(f"{name}_over_base")) for name, value in ordered.items()}


def _legend_above(axes: matplotlib.axes.Axes) -> None:
    """Puts a two-column legend above the axes, where it covers nothing."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, columnspacing=1.4, handlelength=1.8, borderaxespad=0.2
    )


def _plain_logarithmic_ticks(axes: matplotlib.axes.Axes) -> None:
    """Labels a logarithmic axis with plain numbers, even if it spans less than a decade."""
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    subdivisions = (1,) if decades > 2.5 else (1, 2, 5) if decades > 1.2 else (1, 1.5, 2, 3, 5, 7)
    if decades > 0.7:
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=subdivisions))
    else:
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_ylim(low, high)
