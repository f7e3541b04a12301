"""Tables and pictures of the comparison's page."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence

import matplotlib.figure


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], style: str = "") -> str:
    """An HTML table of text cells; `style` is a CSS class of the enclosing element."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="table {style}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def picture(figure: matplotlib.figure.Figure, caption: str, width: str = "40rem") -> str:
    """A figure as inline SVG."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    svg = drawn.getvalue()
    return (
        f'<figure style="max-width: {width}"><figcaption>{html.escape(caption)}</figcaption>'
        f"{svg[svg.index('<svg') :]}</figure>"
    )
