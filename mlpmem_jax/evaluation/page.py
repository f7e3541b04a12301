"""The report as one self-contained HTML page: no network, no scripts, readable on paper and on a phone."""

from __future__ import annotations

import html
import json
import math
import statistics
from collections.abc import Callable, Iterable

import matplotlib.figure
from etils import epath

from mlpmem_jax.evaluation import figures, wording

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

STYLE = """
:root { --ink: #1f2933; --faint: #5f6b78; --line: #dde2e7; --accent: #0072b2; --wash: #f4f6f8; }
* { box-sizing: border-box; }
body { font: 1rem/1.5 system-ui, "Helvetica Neue", Arial, sans-serif; color: var(--ink); background: #fff;
       margin: 0 auto; max-width: 70rem; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1rem; font-weight: 600; color: var(--faint); margin: 0; }
.headline { font-size: clamp(1.2rem, 2.6vw, 1.6rem); line-height: 1.35; font-weight: 600; margin: .4rem 0 1.4rem;
            max-width: 58rem; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .8rem; padding-top: .9rem; border-top: 1px solid var(--line); }
p { max-width: 46rem; margin: .5rem 0; }
.tiles { display: grid; gap: .75rem; margin-top: 1.4rem;
         grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); }
.tile { background: var(--wash); border-radius: .5rem; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile.main { background: var(--accent); color: #fff; }
.tile small { color: var(--faint); display: block; line-height: 1.35; margin-top: .15rem; }
.tile.main small { color: #e3f0f8; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1.5rem; }
figure { margin: 0; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .4rem; }
.figures > div { min-width: 0; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; margin: .8rem 0; }
th, td { text-align: right; padding: .32rem .5rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:last-child, td:last-child { padding-right: 0; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--faint); font-weight: 600; vertical-align: bottom; }
tr.main td { font-weight: 700; }
details { margin: .6rem 0; }
summary { cursor: pointer; font-weight: 600; }
pre { background: var(--wash); padding: 1rem; border-radius: .5rem; overflow-x: auto; font-size: .8rem; }
@media (max-width: 40rem) { body { padding: 1.2rem .9rem 3rem; } th, td { padding: .3rem .5rem; } }
@media print { html { font-size: 10px; } body { max-width: none; padding: 0; } h2 { break-after: avoid; }
  figure, .tiles, table { break-inside: avoid; } .figures { grid-template-columns: 1fr 1fr; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def page(metrics: dict) -> str:
    """The report as one HTML document, from the values of metrics.json."""
    corpus, counts = metrics["config"]["corpus"], metrics["counts"]
    source = epath.Path(corpus["path"]).name or corpus["name"] or corpus["source"].replace("_", " ")
    size = {name: wording.magnitude(count) for name, count in counts["parameters"].items()}
    about = (
        f"MLP Memory on {source}: {counts['tokens']['train']:,} training tokens, base LM of {size['base']} parameters"
        f"{_finetuned(metrics['training_runs']['base'])}, memory of {size['memory']}"
    )
    first, *others = wording.verdict(metrics)
    sections = [
        f"<h1>{html.escape(about)}</h1>",
        f'<p class="headline">{html.escape(first)}</p>',
        f"<p>{html.escape(' '.join(others))}</p>" if others else "",
        _tiles(metrics),
        _perplexity_section(metrics),
        _breakdown_section(metrics),
        _training_section(metrics),
        _shapes_section(metrics),
        f'<div class="figures">{_targets_section(metrics)}{_stages_section(metrics)}</div>',
        _provenance_section(metrics),
    ]
    return document(f"MLP Memory report: {source}", sections)


def document(title: str, sections: Iterable[str], style: str = "") -> str:
    """One HTML document of sections, which are HTML too; `style` is CSS in addition to STYLE."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _finetuned(base: dict) -> str:
    """A note for a base that was imported and then fine-tuned on the corpus."""
    if "rate_search_flops" not in base:
        return ""
    return f", fine-tuned on this text (step {base['step']} of {base['steps']} kept)"


def _tiles(metrics: dict) -> str:
    of, intervals = metrics["perplexity"]["test"], metrics["interval"]["test"]
    kept = metrics["gain_kept"]["test"]
    level = wording.level(metrics)
    tiles = [
        (wording.number(of["base"]), "test perplexity of the base LM"),
        (
            wording.number(of["augmented"]),
            f"with the memory (λ\u00a0=\u00a0{metrics['interpolation_weight']['memory']:.2f})",
        ),
        (
            f"{of['augmented'] / of['base']:.3f}",
            f"ratio of these two, {level} interval {wording.interval(intervals['augmented_over_base'])}",
        ),
        (wording.ABSENT if kept is None else wording.percent(kept), "of kNN-LM's gain, without any search"),
        (
            wording.number(of["knn_lm"]),
            f"with kNN search (λ\u00a0=\u00a0{metrics['interpolation_weight']['knn_lm']:.2f})",
        ),
        (wording.number(of["memory"]), "the memory alone"),
    ]
    rendered = [
        f'<div class="tile{" main" if index == 1 else ""}"><b>{value}</b><small>{html.escape(text)}</small></div>'
        for index, (value, text) in enumerate(tiles)
    ]
    return f'<div class="tiles">{"".join(rendered)}</div>'


def _perplexity_section(metrics: dict) -> str:
    weights, controls = metrics["interpolation_weight"], metrics["controls"]
    lines = []
    for name in ("base", "memory", "knn_lm", "augmented", *controls):
        of = {
            split: controls[name]["perplexity"][split] if name in controls else metrics["perplexity"][split][name]
            for split in ("validation", "test")
        }
        interval = metrics["interval"]["test"].get(f"{name}_over_base")
        weight = weights.get({"augmented": "memory", "memory": ""}.get(name, name))
        lines.append(
            (
                wording.label(name),
                wording.number(of["validation"]),
                wording.number(of["test"]),
                f"{of['test'] / metrics['perplexity']['test']['base']:.3f}",
                "" if interval is None else wording.interval(interval),
                "" if weight is None else f"{weight:.3f}",
            )
        )
    level, drawn = wording.level(metrics), metrics["interval"]
    of_base = wording.number(metrics["perplexity"]["test"]["base"])
    heads = ("system", "validation", "test", f"ratio to base ({of_base})", f"{level} interval", "λ")
    return (
        '<h2>Perplexity</h2><div class="figures">'
        + _figure("Test perplexity by system", figures.perplexities(metrics), "perplexities")
        + _figure("Perplexity by interpolation weight", figures.weights(metrics), "weights")
        + f"</div>{_table(heads, lines, main='base + memory')}"
        f"<p>Every λ is tuned on the whole validation split; generation and export take the memory's from this report. "
        f"All systems are scored in {metrics['compute_dtype']}. Intervals are of the ratio of test perplexities to the "
        f"base's, Student's t with the {drawn['clusters']:,} {drawn['cluster']}s of the test split as clusters.</p>"
        + _controls_table(metrics)
        + _rate_searches(metrics)
        + _left_out(metrics)
        + _overlap_table(metrics["overlap"])
    )


def _controls_table(metrics: dict) -> str:
    if not metrics["controls"]:
        return ""
    of_memory = metrics["perplexity"]["test"]["augmented"]
    lines = [
        (
            wording.label(name),
            wording.number(control["perplexity"]["test"]),
            f"{of_memory / control['perplexity']['test']:.3f}",
            wording.interval(control["interval_of_augmented_over_it"]),
            {True: "yes", None: "not shown", False: "no"}[wording.beats(control)],
            wording.ABSENT
            if control["share_of_memory_gain"] is None
            else wording.percent(control["share_of_memory_gain"]),
        )
        for name, control in metrics["controls"].items()
    ]
    level = wording.level(metrics)
    heads = (
        "control",
        "test",
        f"base + memory ({wording.number(of_memory)}) over it",
        f"{level} interval",
        "memory better",
        "share of the memory's gain",
    )
    return _table(heads, lines)


def _rate_searches(metrics: dict) -> str:
    """The compute spent on searching a learning rate, where one was searched; no other number includes it."""
    return "".join(
        f"<p>{html.escape(wording.label(name))}: the learning rate {run['learning_rate']:g} was found by other runs "
        f"that took {run['rate_search_flops']:.2g} FLOPs, on top of {run['training_flops']:.2g} for the training.</p>"
        for name, run in {**metrics["training_runs"], **metrics["control_runs"]}.items()
        if "rate_search_flops" in run
    )


def _left_out(metrics: dict) -> str:
    reasons = metrics["controls_left_out"].values()
    return "".join(f"<p>Left out, not a control of this memory: {html.escape(reason)}.</p>" for reason in reasons)


def _overlap_table(overlap: dict[str, dict[str, float]]) -> str:
    """Shares of held-out text that also occur verbatim in the training text, by split and n-gram length."""
    if not overlap:
        return ""
    lengths = sorted({length for shares in overlap.values() for length in shares}, key=int)
    lines = [
        (split, *(f"{100 * shares[length]:.2f} %" if length in shares else wording.ABSENT for length in lengths))
        for split, shares in overlap.items()
    ]
    return "<p>Share of words that are part of a run of words that also occurs in the training text:</p>" + _table(
        ("split", *(f"runs of {length}" for length in lengths)), lines
    )


def _breakdown_section(metrics: dict) -> str:
    """The gain over the base by kind of position: a plot and a table for each way of grouping."""
    heads = ("tokens", "base", "memory", f"{wording.level(metrics)} interval", "share", "kNN")
    blocks = []
    for name, figure in figures.breakdowns(metrics).items():
        lines = [
            (
                figures.bin_label(row, name),
                f"{100 * row['share_of_positions']:.1f} %",
                f"{row['base']:.2f}",
                f"{row['gain']['augmented']:.3f}",
                _nats(row["interval"]["augmented"]),
                wording.ABSENT
                if row["share_of_gain"]["augmented"] is None
                else wording.percent(row["share_of_gain"]["augmented"]),
                f"{row['gain']['knn_lm']:.3f}",
            )
            for row in metrics["breakdown"][name]
        ]
        head = {"token_count": "count", "context_count": "count", "base_entropy": "nats"}[name]
        caption = f"By {figures.BREAKDOWNS[name]}"
        blocks.append(f"<div>{_figure(caption, figure, name)}{_table((head, *heads), lines)}</div>")
    sampled = sum(row["positions"] for row in metrics["breakdown"]["base_entropy"])
    return (
        "<h2>Where the memory helps</h2><p>Gain over the base, in nats per token of the test split, of base + memory "
        "and of base + kNN at their λ. Table columns: the share of all tokens, the base's negative log-likelihood, "
        "both gains, and the share of the memory's total gain. Occurrences are counted in "
        f"{metrics['breakdown']['counted_tokens']:,} tokens of the training text; entropy is computed at a sample of "
        f'{sampled:,} positions.</p><div class="figures">{"".join(blocks)}</div>'
    )


def _nats(bounds: list[float] | None) -> str:
    return wording.ABSENT if bounds is None else f"{bounds[0]:.3f} to {bounds[1]:.3f}"


def _training_section(metrics: dict) -> str:
    titles = {
        "memory_validation": "Validation perplexity of the memory",
        "memory_losses": "Training losses of the memory",
        "base_validation": "Validation perplexity of the base LM",
    }
    drawn = figures.training(metrics)
    blocks = [_figure(title, drawn[name], name) for name, title in titles.items() if name in drawn]
    return f'<h2>Training</h2><div class="figures">{"".join(blocks)}<div>{_runs_table(metrics)}</div></div>'


def _runs_table(metrics: dict) -> str:
    """For each training run: values from its manifest, and medians of per-step measurements."""
    runs = metrics["training_runs"]

    def median(name: str, measure: str) -> float | None:
        values = [record[measure] for record in metrics["training"].get(name, []) if measure in record]
        return statistics.median(values) if values else None

    def row(words: str, cell: Callable[[str], float | None], scale: float = 1, unit: str = "") -> tuple[str, ...]:
        cells = [cell(name) for name in runs]
        return words, *(wording.ABSENT if value is None else wording.quantity(value * scale) + unit for value in cells)

    lines = [
        row("optimizer steps", lambda name: runs[name].get("steps")),
        row("selected step", lambda name: runs[name].get("step")),
        row("positions per second", lambda name: median(name, "positions_per_second")),
        row("GFLOP/s", lambda name: median(name, "flops_per_second"), 1e-9),
        row("share of the matmul rate", lambda name: median(name, "utilization"), 100, " %"),
        row("time waiting for input", lambda name: median(name, "input_wait"), 100, " %"),
        row("parameters", lambda name: metrics["counts"]["parameters"][name]),
    ]
    return _table(("training run", *runs), lines)


def _shapes_section(metrics: dict) -> str:
    titles = {
        "tokens_above": ("Tokens above a probability", "tokens above", _power_of_ten),
        "tokens_for_mass": ("Tokens that hold a share of the mass", "tokens for", lambda at: f"{100 * float(at):g} %"),
    }
    shapes = metrics["sharpness"]
    first = next(iter(shapes.values()))
    blocks = []
    for kind, figure in figures.shapes(metrics).items():
        caption, head, column = titles[kind]
        lines = [(wording.label(name), *map(wording.quantity, table[kind].values())) for name, table in shapes.items()]
        blocks.append(f"<div>{_figure(caption, figure, kind)}{_table((head, *map(column, first[kind])), lines)}</div>")
    return (
        f"<h2>Shape of the distributions</h2><p>Means over {first['positions']:,} test positions.</p>"
        f'<div class="figures">{"".join(blocks)}</div>'
    )


def _power_of_ten(threshold: str) -> str:
    value = float(threshold)
    return "10" + f"{math.log10(value):.0f}".translate(_SUPERSCRIPTS) if value else "0"


def _targets_section(metrics: dict) -> str:
    names = {
        "k": "neighbors",
        "temperature": "temperature, squared L2",
        "recall_at_k": "recall@k versus exact search",
        "total_variation": "total variation from exact targets",
        "mean_entries": "tokens per position, mean",
        "dropped_mass": "probability dropped, mean",
        "bytes_per_position": "bytes per position",
        "positions_lacking_k": "positions with fewer than k neighbors",
    }
    targets = metrics["targets"]
    lines = [(words, wording.quantity(targets[name])) for name, words in names.items() if name in targets]
    heads = ("neighbor search", str(targets.get("backend", "")))
    return f"<div><h2>Targets</h2>{_table(heads, lines)}{_search_table(metrics['search_curve'])}</div>"


def _search_table(curve: list[dict]) -> str:
    """Search settings that were tried on a sample, and the results of each."""
    names = {
        "leaves_to_search": "leaves searched",
        "reorder": "candidates per neighbor",
        "bytes_read": "bytes read",
        "recall": "recall",
        "total_variation": "total variation",
    }
    if not curve:
        return ""
    columns = {name: words for name, words in names.items() if name in curve[0]}
    lines = [[wording.quantity(row[name]) for name in columns] for row in curve]
    return "<p>Search settings tried on a sample:</p>" + _table(columns.values(), lines)


def _stages_section(metrics: dict) -> str:
    seconds, peaks = metrics["seconds"], metrics["peak_rss_bytes"]
    bytes_by_stage = {}
    for name, size in metrics["bytes"].items():
        stage = {"memory": "train"}.get(name, name if name in seconds else name.split("/")[0])
        bytes_by_stage[stage] = bytes_by_stage.get(stage, 0) + size
    lines = [
        (
            stage,
            f"{seconds[stage]:,.1f}" if stage in seconds else wording.ABSENT,
            f"{peaks[stage] / 2**30:.2f}" if stage in peaks else wording.ABSENT,
            f"{bytes_by_stage[stage] / 2**20:,.1f}" if stage in bytes_by_stage else wording.ABSENT,
        )
        for stage in dict.fromkeys([*bytes_by_stage, *seconds])
    ]
    total = (
        "all",
        f"{sum(seconds.values()):,.1f}",
        f"{max(peaks.values()) / 2**30:.2f}",
        f"{sum(bytes_by_stage.values()) / 2**20:,.1f}",
    )
    heads = ("stage", "seconds", "peak memory, GiB", "written, MiB")
    return f"<div><h2>Cost</h2>{_table(heads, [*lines, total], main='all')}</div>"


def _provenance_section(metrics: dict) -> str:
    folds = {"Resolved config": metrics["config"], "Versions and fingerprints": metrics["provenance"]}
    return "<h2>Provenance</h2>" + "".join(
        f"<details><summary>{title}</summary><pre>{html.escape(json.dumps(content, indent=2))}</pre></details>"
        for title, content in folds.items()
    )


def _figure(caption: str, figure: matplotlib.figure.Figure, name: str) -> str:
    picture = figures.svg(figure, name).replace("<svg ", f'<svg role="img" aria-label="{html.escape(caption)}" ', 1)
    return f"<figure><figcaption>{html.escape(caption)}</figcaption>{picture}</figure>"


def _table(heads: Iterable[str], lines: Iterable[Iterable[str]], main: str = "") -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "".join(
        f"<tr class='{'main' if cells[0] == main else ''}'>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for cells in map(tuple, lines)
    )
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
