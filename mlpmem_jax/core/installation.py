"""Where the ready configs and the launchers are: folders in a checkout's root, or parts of the installed package."""

from __future__ import annotations

import pathlib

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]
_IS_WHEEL = (_PACKAGE / "launch").is_dir()

READY = _PACKAGE / "ready" if _IS_WHEEL else _PACKAGE.parent
"""The folder that contains `configs`. In a wheel it is separate, to avoid conflicts with a user's `configs`."""

LAUNCHERS = "mlpmem_jax.launch" if _IS_WHEEL else "launch"
"""The package whose modules `python -m` runs to submit jobs."""
