"""The lines of `mlpmem benchmark`."""

from __future__ import annotations


def row(name: str, value: float, unit: str, detail: str) -> dict:
    """One measurement: its name, value and unit, and details of how it was measured."""
    return {"name": name, "value": float(value), "unit": unit, "detail": detail}
