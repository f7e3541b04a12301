"""The comparison as one self-contained HTML page: no network, no scripts."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence

import matplotlib.figure

from mlpmem_jax.evaluation.page import STYLE

_STYLE = ".texts td, .texts th { text-align: left; white-space: normal; }"
DISAGREEMENTS = 10  # questions shown
PUBLISHED = {
    # Table of the paper, Mistral-7B (nine tasks) and Llama-2-7B (questions): another model, for reference alone.
    "sst2": (81.21, 83.19), "mr": (75.35, 79.90), "cr": (62.30, 75.95), "rt": (74.95, 75.42), "hyp": (55.42, 64.15),
    "cb": (69.64, 76.79), "rte": (59.57, 64.62), "agn": (75.95, 80.28), "yahoo": (56.36, 57.33),
    "nq": (23.18, 27.04), "webquestions": (32.09, 36.61), "triviaqa": (56.91, 57.50), "truthfulqa": (29.16, 30.04),
    "hotpotqa": (22.72, 25.69), "halueval_dialogue": (57.18, 66.86), "halueval_qa": (53.99, 64.07),
    "halueval_summarization": (50.27, 52.41),
}  # fmt: skip


def page(comparison: dict, answers: Sequence[dict]) -> str:
    """The page, from compare.json and the lines of answers.jsonl."""
    tasks, names = comparison["tasks"], list(comparison["systems"])
    sections = [
        "<h1>MLP Memory: systems compared on the same questions</h1>",
        f'<p class="headline">{html.escape(verdict(comparison))}</p>',
        _scores(comparison),
        *(_task(comparison, name) for name in tasks),
        _costs(comparison),
        _disagreements(answers, names),
        _provenance(comparison),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>MLP Memory: comparison</title>\n<style>{STYLE}{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def verdict(comparison: dict) -> str:
    """Which differences to the base LM the data support, in a sentence or two."""
    better, worse, asked = [], [], 0
    for task in comparison["tasks"].values():
        for name, of in task["systems"].items():
            if name == "base":
                continue
            for measure in dict.fromkeys((task["headline"], task["tuned on"])):
                asked += 1
                low, high = of["over base"][measure]
                words = f"{comparison['systems'][name]['title']} on {task['title']}, {measure}"
                better += [words] if low > 0 else []
                worse += [words] if high < 0 else []
    text = f"Of {asked} differences to the base LM, {len(better)} are gains that the data support"
    text += f" ({'; '.join(better)})" if better else ""
    text += f", {len(worse)} are losses" + (f" ({'; '.join(worse)})" if worse else "")
    return text + f"; the other {asked - len(better) - len(worse)} may be chance."


def _shown(measure: str, value: float) -> str:
    """Shares as percentages, log-probabilities in nats."""
    return f"{value:.2f}" if "log-probability" in measure else f"{100 * value:.1f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], style: str = "") -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="table {style}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _scores(comparison: dict) -> str:
    shown = [
        (name, task, measure)
        for name, task in comparison["tasks"].items()
        for measure in dict.fromkeys((task["headline"], task["tuned on"]))
    ]
    rows = []
    for name, system in comparison["systems"].items():
        cells = [_shown(measure, task["systems"][name]["measures"][measure]) for _, task, measure in shown]
        rows.append([system["title"], *cells])
    for index, title in enumerate(("published, base LM of 7B", "published, with its memory")):
        figures = [
            f"{PUBLISHED[name][index]:.1f}" if name in PUBLISHED and measure == task["headline"] else ""
            for name, task, measure in shown
        ]
        rows += [[title, *figures]] if any(figures) else []
    heads = ["system", *(f"{task['title']} ({measure})" for _, task, measure in shown)]
    note = (
        "Shares in percent, log-probabilities in nats. Published figures (arXiv 2508.01832: Mistral-7B-v0.3 on tasks "
        "of words, Llama-2-7B on questions) are of other models on other text, for reference alone."
    )
    return f"<h2>Scores</h2>{_table(heads, rows)}<p>{note}</p>"


def _task(comparison: dict, name: str) -> str:
    task = comparison["tasks"][name]
    measures = list(task["systems"]["base"]["measures"])
    level = f"{100 * comparison['confidence']:g} %"
    rows = []
    for system, of in task["systems"].items():
        cells = []
        for measure in measures:
            cells.append(_shown(measure, of["measures"][measure]))
            if system == "base":
                cells.append("")
            else:
                low, high = of["over base"][measure]
                cells.append(f"{_shown(measure, low)} to {_shown(measure, high)}")
        weights = ", ".join(f"{weight:.2f}" for weight in of["weights"])
        rows.append([comparison["systems"][system]["title"], *cells, weights])
    heads = ["system", *(text for measure in measures for text in (measure, f"over base, {level}")), "λ"]
    notes = [
        f"{task['questions']:,} questions; {task['source']}.",
        f"λ from {task['weights from']}, by {task['tuned on']}.",
    ]
    for system, of in task["systems"].items():
        if of["curve"]:
            honest, own = of["measures"][task["tuned on"]], of["tuned on what is reported"]
            title = comparison["systems"][system]["title"]
            notes.append(
                f"{title}: {task['tuned on']} {_shown(task['tuned on'], honest)}; it would be "
                f"{_shown(task['tuned on'], own)} with the λ that is best on the reported questions themselves."
            )
    text = " ".join(html.escape(note) for note in notes)
    return f"<h2>{html.escape(task['title'])}</h2>{_table(heads, rows)}<p>{text}</p>{_curves(comparison, name)}"


def _curves(comparison: dict, name: str) -> str:
    """The measure that weights are tuned on, by weight."""
    task = comparison["tasks"][name]
    curves = {system: of["curve"] for system, of in task["systems"].items() if of["curve"]}
    if not curves:
        return ""
    figure = matplotlib.figure.Figure(figsize=(6.0, 2.8), layout="constrained")
    axes = figure.subplots()
    scale = 1.0 if "log-probability" in task["tuned on"] else 100.0
    for system, curve in curves.items():
        values = [scale * value for value in curve]
        axes.plot(comparison["grid"], values, marker=".", label=comparison["systems"][system]["title"])
    axes.set_xlabel("interpolation weight λ")
    axes.set_ylabel(task["tuned on"] + (", nats" if scale == 1.0 else ", %"))
    axes.legend(frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    svg = drawn.getvalue()
    caption = html.escape(f"{task['title']}: {task['tuned on']} by λ, over all reported questions")
    return f'<figure style="max-width: 40rem"><figcaption>{caption}</figcaption>{svg[svg.index("<svg") :]}</figure>'


def _costs(comparison: dict) -> str:
    rows = [
        [
            system["title"],
            f"{system['training_flops']:.2e}" if system["training_flops"] else "0",
            f"{system['construction_flops']:.2e}" if system["construction_flops"] else "0",
            f"{system['parameters'] / 1e6:,.0f} M",
            f"{system['bytes'] / 1e6:,.0f} MB",
            f"{system['seconds']:,.0f} s",
        ]
        for system in comparison["systems"].values()
    ]
    heads = (
        "system",
        "training, FLOPs",
        "datastore and neighbors, FLOPs",
        "parameters",
        "on disk",
        "scored and written in",
    )
    return f"<h2>What they cost</h2>{_table(heads, rows)}"


def _disagreements(answers: Sequence[dict], names: Sequence[str]) -> str:
    """Questions on which the texts of systems differ, at most one in a row from each task's start."""
    shown = []
    for line in answers:
        texts = {name: of["text"] for name, of in line["systems"].items() if of["text"] is not None}
        if len(set(texts.values())) > 1:
            shown.append((len(set(texts.values())), line, texts))
    shown.sort(key=lambda item: -item[0])
    if not shown:
        return ""
    blocks = []
    for _, line, texts in shown[:DISAGREEMENTS]:
        gold = line["gold"] if isinstance(line["gold"], str) else ", ".join(map(str, line["gold"] or []))
        rows = [[name, texts[name]] for name in names if name in texts]
        question = html.escape(line["prompt"][-300:])
        blocks.append(
            f"<p><b>{question}</b><br>accepted: {html.escape(gold)}</p>{_table(('system', 'answer'), rows, 'texts')}"
        )
    return f"<h2>Where they disagree</h2>{''.join(blocks)}"


def _provenance(comparison: dict) -> str:
    from_ = comparison["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in from_["libraries"].items())
    text = f"Python {from_['python']}, {from_['platform']}, {from_['devices']}; {versions}"
    return f"<h2>Provenance</h2><details><summary>Versions and fingerprints</summary><p>{html.escape(text)}</p>" + (
        _table(("artifact", "fingerprint"), [[name, value[:16]] for name, value in from_["fingerprints"].items()])
        + "</details>"
    )
