"""The speed section of the page: time to first token and tokens per second, by corpus size."""

from __future__ import annotations

import html

import matplotlib.figure
import matplotlib.ticker
import numpy as np

from mlpmem_jax.comparison import markup

_BASE = "base"


def section(speed: dict) -> str:
    """The section as HTML, from the contents of speed.json."""
    heads = ("system", "positions", "batch", "prompt, tokens", "first token, ms", "/ base", "tokens/s", "/ base")
    notes = [
        f"Prompts of {speed['prompt_tokens']} tokens, plus passages for systems that retrieve; "
        f"{speed['new_tokens']} tokens generated. Medians of {speed['rounds']} rounds over all systems, with minimum "
        "and maximum in parentheses; ratios are medians of the ratios within a round. Times include searches. "
        f"Beyond {speed['real_positions']:,} positions, keys are noisy copies of real ones and passages have "
        f"shuffled words. {speed['device']}, {speed['cores']} cores.",
        *(
            f"Skipped: {line['system']}"
            + (f" at {line['positions']:,} positions" if line["positions"] else "")
            + f", {line['reason']}."
            for line in speed["skipped"]
        ),
    ]
    text = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return f"<h2>Speed by the size of the corpus</h2>{_picture(speed)}{text}{markup.table(heads, rows(speed))}"


def rows(speed: dict) -> list[list[str]]:
    """The cells of the table, one row per measurement."""
    bases = {(line["positions"], line["batch"]): line for line in speed["measured"] if line["system"] == _BASE}
    texts = []
    for line in speed["measured"]:
        base = bases[line["positions"], line["batch"]]
        rates, base_rates = (line["batch"] / np.array(of["next"]) for of in (line, base))
        texts.append(
            [
                speed["titles"][line["system"]],
                f"{line['positions']:,}",
                str(line["batch"]),
                str(line["prompt_tokens"]),
                _range(1e3 * np.array(line["first"])),
                f"{np.median(np.divide(line['first'], base['first'])):.2f}",
                _range(rates),
                f"{np.median(rates / base_rates):.2f}",
            ]
        )
    return texts


def _range(values: np.ndarray) -> str:
    return f"{np.median(values):,.1f} ({values.min():,.1f} to {values.max():,.1f})"


def _picture(speed: dict) -> str:
    batches = sorted({line["batch"] for line in speed["measured"]})
    figure = matplotlib.figure.Figure(figsize=(9.0, 3.0 * len(batches)), layout="constrained")
    for batch, panels in zip(batches, figure.subplots(len(batches), 2, sharex=True, squeeze=False), strict=True):
        for system, title in speed["titles"].items():
            of = [line for line in speed["measured"] if (line["system"], line["batch"]) == (system, batch)]
            positions = [line["positions"] for line in of]
            for axes, values in zip(
                panels,
                ([1e3 * np.array(line["first"]) for line in of], [batch / np.array(line["next"]) for line in of]),
                strict=True,
            ):
                medians = np.array([np.median(value) for value in values])
                ends = np.array([(np.min(value), np.max(value)) for value in values]).reshape(-1, 2).T
                axes.errorbar(positions, medians, np.abs(ends - medians), marker=".", capsize=2, label=title)
        for axes, name in zip(panels, ("time to the first token, ms", "tokens per second"), strict=True):
            if len({line["positions"] for line in speed["measured"]}) > 1:
                axes.set_xscale("log")
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(matplotlib.ticker.LogFormatter(minor_thresholds=(1, 0.5)))
            axes.set_title(f"{name}, batch {batch}", fontsize="medium")
            axes.spines[["top", "right"]].set_visible(False)
    for axes in panels:
        axes.set_xlabel("positions of the corpus")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize="small")
    caption = "Time to the first token and tokens per second, by the size of the corpus: a memory's cannot depend on it"
    return markup.picture(figure, caption, "60rem")
