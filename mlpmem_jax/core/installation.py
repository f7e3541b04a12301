"""Where the ready configs and the launchers are: folders of a checkout's root, or parts of the installed package."""

from __future__ import annotations

import pathlib

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]
_IS_WHEEL = (_PACKAGE / "launch").is_dir()

READY = _PACKAGE / "ready" if _IS_WHEEL else _PACKAGE.parent
"""The folder that holds `configs`. In a wheel it has a folder of its own, out of the way of a user's `configs`."""

LAUNCHERS = "mlpmem_jax.launch" if _IS_WHEEL else "launch"
"""The package whose modules `python -m` runs to send jobs."""
