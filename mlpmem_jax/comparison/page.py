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

_STYLE = """.texts td, .texts th { text-align: left; white-space: normal; }
th { white-space: pre-line; }
td { white-space: pre; }
"""
_MARKS = {1: "\N{BLACK UP-POINTING TRIANGLE}", -1: "\N{BLACK DOWN-POINTING TRIANGLE}", 0: "\N{FIGURE SPACE}"}
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
    """How many differences from the base LM the data support, in a sentence."""
    signs = [
        _sign(task, name, measure)
        for task in comparison["tasks"].values()
        for name in task["systems"]
        if name != "base"
        for measure in task["differences"]
    ]
    gains, losses = signs.count(1), signs.count(-1)
    return (
        f"Of {len(signs)} differences to the base LM, {gains} are gains that the data support, {losses} are losses; "
        f"the other {len(signs) - gains - losses} may be chance."
    )


def _sign(task: dict, system: str, measure: str) -> int:
    """1 for a gain over the base LM that the data support, -1 for a loss, else 0."""
    if system == "base" or task["questions"] < FEWEST:
        return 0
    low, high = task["systems"][system]["over base"][measure]
    return int(low > 0) - int(high < 0)


def _shown(measure: str, value: float) -> str:
    scale, _ = _unit(measure)
    return f"{value:.2f}" if scale == 1 else f"{scale * value:.1f}"


def _unit(measure: str) -> tuple[float, str]:
    """(what values are multiplied by when shown, their unit): log-probabilities in nats, shares in percent."""
    return (1.0, "nats") if "log-probability" in measure else (100.0, "%")


def _scores(comparison: dict) -> str:
    rows = []
    for task in comparison["tasks"].values():
        for measure in task["differences"]:
            cells = [
                f"{_shown(measure, of['measures'][measure])} {_MARKS[_sign(task, name, measure)]}"
                for name, of in task["systems"].items()
            ]
            rows.append([f"{task['title']}, {measure}", *cells])
    heads = ["task", *(system["title"] for system in comparison["systems"].values())]
    note = (
        f"Shares in percent, log-probabilities in nats. {_MARKS[1]} better than the base LM, {_MARKS[-1]} worse: the "
        f"{100 * comparison['confidence']:g} % interval of the paired difference does not contain 0."
    )
    return f"<h2>Scores</h2>{markup.table(heads, rows)}<p>{note}</p>{_published(comparison)}"


def _published(comparison: dict) -> str:
    """The paper's results for the same tasks and systems."""
    names = [name for name in comparison["tasks"] if (name, "base") in PUBLISHED]
    if not names:
        return ""
    titles = {
        name: system["title"]
        for name, system in comparison["systems"].items()
        if any((task, name) in PUBLISHED for task in names)
    }
    rows = [
        [
            comparison["tasks"][task]["title"],
            *(f"{PUBLISHED[task, name]:.2f}" if (task, name) in PUBLISHED else "" for name in titles),
        ]
        for task in names
    ]
    heads = ["task", *titles.values()]
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
            interval = "\n"
            if system != "base":
                low, high = of["over base"][measure]
                interval = f"\n{_shown(measure, low)} to {_shown(measure, high)}"
            cells.append(_shown(measure, of["measures"][measure]) + interval)
        weights = ", ".join(f"{weight:.2f}" for weight in of["weights"])
        rows.append([comparison["systems"][system]["title"], *cells, weights])
    heads = ["system", *measures, "λ"]
    notes = [
        f"Below each value, the {level} interval of its difference to the base LM.",
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
    return f"<h2>{html.escape(task['title'])}</h2>{markup.table(heads, rows)}<p>{text}</p>" + (
        _curves(comparison, name) + _differences(comparison, name)
    )


def _curves(comparison: dict, name: str) -> str:
    """The metric that weights are tuned on, by weight."""
    task = comparison["tasks"][name]
    curves = {system: of["curve"] for system, of in task["systems"].items() if of["curve"]}
    if not curves:
        return ""
    figure = matplotlib.figure.Figure(figsize=(6.0, 2.8), layout="constrained")
    axes = figure.subplots()
    scale, unit = _unit(task["tuned on"])
    for system, curve in curves.items():
        values = [scale * value for value in curve]
        axes.plot(comparison["grid"], values, marker=".", label=comparison["systems"][system]["title"])
    axes.set_xlabel("interpolation weight λ")
    axes.set_ylabel(f"{task['tuned on']}, {unit}")
    axes.legend(frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    return markup.picture(figure, f"{task['title']}: {task['tuned on']} by λ, over all reported questions")


def _differences(comparison: dict, name: str) -> str:
    """The differences of all pairs of systems, with their intervals."""
    task, pictures = comparison["tasks"][name], []
    if task["questions"] < FEWEST or len(task["systems"]) < 3:
        return ""
    titles = {system: of["title"] for system, of in comparison["systems"].items()}
    for measure, records in task["differences"].items():
        scale, unit = _unit(measure)
        supported = [record["interval"][0] > 0 for record in records]
        figure = matplotlib.figure.Figure(figsize=(7.5, 0.7 + 0.22 * len(records)), layout="constrained")
        axes = figure.subplots()
        for place, record in enumerate(records):
            color = "C0" if supported[place] else "0.6"
            axes.plot([scale * end for end in record["interval"]], [place, place], color=color, linewidth=2)
            axes.plot([scale * record["mean"]], [place], "o", color=color, markersize=5)
        labels = [f"{titles[record['better']]} over {titles[record['worse']]}" for record in records]
        axes.set_yticks(range(len(records)), labels, fontsize="small")
        axes.invert_yaxis()
        axes.axvline(0, color="0.4", linewidth=0.8)
        axes.set_xlabel(f"difference in {measure}, {'points' if unit == '%' else unit}")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        caption = (
            f"{task['title']}: {measure} of every two systems. Gray: the {100 * comparison['confidence']:g} % interval "
            f"contains 0 ({supported.count(False)} of {len(records)})"
        )
        pictures.append(markup.picture(figure, caption, "48rem"))
    is_open = " open" if len(comparison["tasks"]) == 1 else ""
    return f"<details{is_open}><summary>Differences between systems</summary>{''.join(pictures)}</details>"


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
