"""The lines of `mlpmem benchmark`."""

from __future__ import annotations


def row(name: str, value: float, unit: str, detail: str) -> dict:
    """One measurement: what it is of, the figure, its unit, and what it was measured on."""
    return {"name": name, "value": float(value), "unit": unit, "detail": detail}
