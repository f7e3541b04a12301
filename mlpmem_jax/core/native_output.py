"""Silences C++ libraries, which bypass Python's standard streams."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
from collections.abc import Iterator


def silence_standard_output() -> None:
    """Discards what C++ prints to standard output for the rest of this process: Gloo logs each connection there."""
    sys.stdout.flush()
    kept = open(os.dup(1), "w", buffering=1, encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: SIM115
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 1)
    sys.stdout = kept


@contextlib.contextmanager
def silenced_standard_error() -> Iterator[None]:
    """Within the context, discards what C++ prints to standard error; its errors are still raised as exceptions.

    A library that aborts raises nothing: then Python's fault handler says where, past the silence.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    was_enabled = faulthandler.is_enabled()
    if not was_enabled:
        faulthandler.enable(file=saved)
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        if not was_enabled:
            faulthandler.disable()
        os.dup2(saved, 2)
        os.close(saved)
