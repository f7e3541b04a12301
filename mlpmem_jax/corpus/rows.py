"""Rows of JSONL files, Parquet files and hub data sets: the text of a row and its group.

A field is named by its key. Dots lead into objects and lists (`data.text`, `ctxs.0.text`), and `+` joins several fields
(`ctxs.0.title+ctxs.0.text`), one per line. A literal key of a row, including dots and plus signs, takes precedence.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

from mlpmem_jax.core.errors import UserError
from mlpmem_jax.corpus.documents import Document


def _fields(key: str, names: Collection[str]) -> list[str]:
    return [key] if key in names else key.split("+")


def _value(container: Any, path: str) -> Any:
    """The value at a path; None if the path leads through a null or beyond the end of a list.

    Raises:
      KeyError: the path does not exist.
    """
    if container is None or path == "":
        return container
    head, _, rest = path.partition(".")
    if isinstance(container, Mapping):
        return container[path] if path in container else _value(container[head], rest)
    if isinstance(container, list) and head.isdecimal():
        return _value(container[int(head)], rest) if int(head) < len(container) else None
    raise KeyError(path)


@dataclasses.dataclass(frozen=True)
class RowReader:
    """Converts rows to documents.

    Attributes:
      text_key: field or fields with the text.
      group_key: field or fields that name the row's group; "" = every row is its own group.
      group_part: regular expression of a suffix to strip from the group's name, such as a part number.
    """

    text_key: str
    group_key: str = ""
    group_part: str = ""

    def columns(self, names: Collection[str]) -> list[str]:
        """The columns that these fields need, in a table with columns `names`; some may be absent."""
        keys = [self.text_key, self.group_key] if self.group_key else [self.text_key]
        fields = [field for key in keys for field in _fields(key, names)]
        return list(dict.fromkeys(field if field in names else field.partition(".")[0] for field in fields))

    def document(self, row: Any, where: str) -> Document:
        """The document of one row; its text is "" if the field is null.

        Args:
          row: a mapping of fields.
          where: a description of the row, for errors.

        Raises:
          UserError: the row lacks a field, or the field is not text.
        """
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: expected an object with the field {self.text_key!r}, found {_described(row)}")
        texts = [text for text in self._values(row, where, "text_key", str) if text is not None]
        group = ""
        if self.group_key:
            values = self._values(row, where, "group_key", (str, int))
            if any(value is not None for value in values):
                group = "\0".join(re.sub(self.group_part, "", str(value)) for value in values)
        return Document("\n".join(texts), group)

    def _values(self, row: Mapping, where: str, config_key: str, types) -> list:
        key = getattr(self, config_key)
        values = []
        for field in _fields(key, row):
            try:
                value = _value(row, field)
            except KeyError:
                raise UserError(
                    f"{where}: has no field {field!r}, found the keys {sorted(row)}; set config.corpus.{config_key}"
                ) from None
            if value is not None and not isinstance(value, types):
                raise UserError(
                    f"{where}: expected text at {field!r}, found {_described(value)}; set config.corpus.{config_key}"
                )
            values.append(value)
        return values


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"an object with the keys {sorted(value)}"
    return f"a {type(value).__name__}"
