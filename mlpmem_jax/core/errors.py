"""Errors that a user can act on. The command line prints their text alone and exits with their code."""

from __future__ import annotations

import importlib
from types import ModuleType


class UserError(Exception):
    """Something the user gave cannot work. The text names it, what was expected, what was found, what to do."""

    exit_code = 2
    """What the command line exits with: 2, as for wrong options. Launchers do not restart a job that ends so."""


class ConfigError(UserError):
    """A config key is unknown, has the wrong type, or contradicts another key."""


class ArtifactError(UserError):
    """An artifact is missing, unfinished, corrupt, foreign, newer, or made by another config."""


class Stopped(UserError):
    """The job was preempted or lost a process, and what it had done is kept: the same command resumes from there."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h: launchers start the job again."""


def require(module: str, extra: str) -> ModuleType:
    """Imports `module`, which belongs to the optional extra `extra`.

    Raises:
      UserError: the module is not installed; the text names the extra to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"this needs the Python package {module.split('.')[0]!r}, which is not installed ({error}); "
            f"install the extra: pip install 'mlpmem_jax[{extra}]'"
        ) from error
