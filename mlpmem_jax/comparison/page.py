"""The comparison as one self-contained HTML page: no network, no scripts."""

from __future__ import annotations

import html
import itertools
import json
from collections.abc import Sequence

import matplotlib.figure
from etils import epath

from mlpmem_jax.comparison import markup, speed_page
from mlpmem_jax.comparison.published import PUBLISHED
from mlpmem_jax.evaluation.page import document

_STYLE = ".texts td, .texts th { text-align: left; white-space: normal; }"
DISAGREEMENTS = 10  # questions shown
FEWEST = 10  # fewest questions for which a bootstrap interval is shown


def write(folder: epath.Path) -> None:
    """Writes index.html from those of compare.json (with answers.jsonl) and speed.json that are in the folder."""
    comparison, speed = (_read(folder / f"{name}.json") for name in ("compare", "speed"))
    lines = (folder / "answers.jsonl").read_bytes().splitlines() if comparison else []
    (folder / "index.html").write_text(page(comparison, [json.loads(line) for line in lines], speed))


def _read(file: epath.Path) -> dict | None:
    return json.loads(file.read_text()) if file.exists() else None


def page(comparison: dict | None, answers: Sequence[dict], speed: dict | None = None) -> str:
    """The page as HTML, from compare.json, the records of answers.jsonl, and speed.json; None = file is absent."""
    sections = ["<h1>MLP Memory: systems compared on the same questions</h1>"]
    if comparison:
        sections += [
            f'<p class="headline">{html.escape(verdict(comparison))}</p>',
            _scores(comparison),
            *(_task(comparison, name) for name in comparison["tasks"]),
            _costs(comparison),
        ]
    sections += [speed_page.section(speed)] if speed else []
    if comparison:
        sections += [_disagreements(answers, list(comparison["systems"])), _provenance(comparison)]
    return document("MLP Memory: comparison", sections, _STYLE)


def verdict(comparison: dict) -> str:
    """Which differences from the base LM the data support, in a sentence or two."""
    better, worse, count = [], [], 0
    for task in comparison["tasks"].values():
        for name, of in task["systems"].items():
            if name == "base":
                continue
            for measure in dict.fromkeys((task["headline"], task["tuned on"])):
                count += 1
                low, high = of["over base"][measure]
                words = f"{comparison['systems'][name]['title']} on {task['title']}, {measure}"
                is_enough = task["questions"] >= FEWEST
                better += [words] if low > 0 and is_enough else []
                worse += [words] if high < 0 and is_enough else []
    text = f"Of {count} differences to the base LM, {len(better)} are gains that the data support"
    text += f" ({'; '.join(better)})" if better else ""
    text += f", {len(worse)} are losses" + (f" ({'; '.join(worse)})" if worse else "")
    return text + f"; the other {count - len(better) - len(worse)} may be chance."


def _shown(measure: str, value: float) -> str:
    """Shares as percentages, log-probabilities in nats."""
    return f"{value:.2f}" if "log-probability" in measure else f"{100 * value:.1f}"


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
    heads = ["system", *(f"{task['title']} ({measure})" for _, task, measure in shown)]
    note = "Shares in percent, log-probabilities in nats."
    return f"<h2>Scores</h2>{markup.table(heads, rows)}<p>{note}</p>{_published(comparison)}"


def _published(comparison: dict) -> str:
    """The paper's results for the same tasks and systems."""
    names = [name for name in comparison["tasks"] if (name, "base") in PUBLISHED]
    if not names:
        return ""
    rows = [
        [
            system["title"],
            *(f"{PUBLISHED[task, name]:.2f}" if (task, name) in PUBLISHED else "" for task in names),
        ]
        for name, system in comparison["systems"].items()
        if any((task, name) in PUBLISHED for task in names)
    ]
    heads = ["published, Mistral-7B-v0.3", *(comparison["tasks"][name]["title"] for name in names)]
    note = (
        "For reference only: the paper's results in percent (arXiv 2508.01832), on other text, with λ tuned on the "
        "reported questions; exact match on open questions, the mean of MC1, MC2 and MC3 on TruthfulQA."
    )
    return f"<h3>Published results of Mistral-7B-v0.3</h3>{markup.table(heads, rows)}<p>{note}</p>"


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
    return f"<h2>{html.escape(task['title'])}</h2>{markup.table(heads, rows)}<p>{text}</p>{_curves(comparison, name)}"


def _curves(comparison: dict, name: str) -> str:
    """The metric that weights are tuned on, by weight."""
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
    return markup.picture(figure, f"{task['title']}: {task['tuned on']} by λ, over all reported questions")


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
        "scoring and generation time",
    )
    return f"<h2>What they cost</h2>{markup.table(heads, rows)}"


def _disagreements(answers: Sequence[dict], names: Sequence[str]) -> str:
    """Questions on which systems disagree, most different answers first, alternating between tasks."""
    by_task: dict[str, list[tuple[dict, dict]]] = {}
    for line in answers:
        texts = {name: of["text"] for name, of in line["systems"].items()}
        if len(set(texts.values())) > 1:
            by_task.setdefault(line["task"], []).append((line, texts))
    for lines in by_task.values():
        lines.sort(key=lambda item: -len(set(item[1].values())))
    in_turn = [item for items in itertools.zip_longest(*by_task.values()) for item in items if item]
    if not in_turn:
        return ""
    blocks = []
    for line, texts in in_turn[:DISAGREEMENTS]:
        rows = [[name, texts[name]] for name in names]
        question, accepted = html.escape(line["prompt"][-300:]), html.escape(", ".join(line["accepted"]))
        blocks.append(
            f"<p>{html.escape(line['task'])}: <b>{question}</b><br>accepted: {accepted}</p>"
            + markup.table(("system", "answer"), rows, "texts")
        )
    return f"<h2>Where they disagree</h2>{''.join(blocks)}"


def _provenance(comparison: dict) -> str:
    from_ = comparison["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in from_["libraries"].items())
    text = f"Python {from_['python']}, {from_['platform']}, {from_['devices']}; {versions}"
    return f"<h2>Provenance</h2><details><summary>Versions and fingerprints</summary><p>{html.escape(text)}</p>" + (
        markup.table(("artifact", "fingerprint"), [[name, value[:16]] for name, value in from_["fingerprints"].items()])
        + "</details>"
    )
