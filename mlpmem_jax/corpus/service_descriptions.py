"""Prose from botocore's service descriptions: the documentation of each operation and structure of a web service."""

from __future__ import annotations

import gzip
import html.parser
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

FILE_NAMES = ("service-2.json", "service-2.json.gz")
_BLOCKS = {"p", "li", "ul", "ol", "dl", "dt", "dd", "div", "note", "important", "pre", "h1", "h2", "h3", "h4", "br"}


def texts(file: pathlib.Path) -> Iterator[str]:
    """One text per operation and structure, in order: its documentation and that of its members, without markup.

    Raises:
      ValueError: the file is not a service description.
    """
    content = file.read_bytes()
    description = json.loads(gzip.decompress(content) if file.suffix == ".gz" else content)
    if not isinstance(description, dict):
        raise ValueError(f"{file}: expected an object")
    yield _plain(str(description.get("documentation", "")))
    for part in ("operations", "shapes"):
        for entry in description.get(part, {}).values():
            yield "\n\n".join(filter(None, map(_plain, _documentation(entry))))


def _documentation(entry: Any) -> Iterator[str]:
    if isinstance(entry, dict):
        for key, value in entry.items():
            if key == "documentation" and isinstance(value, str):
                yield value
            else:
                yield from _documentation(value)


class _Text(html.parser.HTMLParser):
    """Collects the text between tags, with a line break where a block begins or ends."""

    def __init__(self):
        super().__init__()
        self.pieces: list[str] = []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.pieces.append("\n" if tag in _BLOCKS else "")

    def handle_endtag(self, tag: str) -> None:
        self.pieces.append("\n" if tag in _BLOCKS else "")

    def handle_data(self, data: str) -> None:
        self.pieces.append(re.sub(r"\s+", " ", data))


def _plain(markup: str) -> str:
    parser = _Text()
    parser.feed(markup)
    parser.close()
    lines = (" ".join(line.split()) for line in "".join(parser.pieces).split("\n"))
    return "\n".join(filter(None, lines))
