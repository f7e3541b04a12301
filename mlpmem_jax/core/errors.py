"""Errors that a user can act on. The command line prints only their text and exits with their code."""

from __future__ import annotations

import importlib
from types import ModuleType


class UserError(Exception):
    """Invalid user input. The text names it, what was expected, what was found, and what to do."""

    exit_code = 2
    """The command line's exit code: 2, as for wrong options. Launchers do not restart a job that exits with it."""


class ConfigError(UserError):
    """A config key is unknown, has the wrong type, or contradicts another key."""


class ArtifactError(UserError):
    """An artifact is missing, unfinished, corrupt, foreign, newer, or built with another config."""


class Stopped(UserError):
    """The job was preempted or lost a process; its finished work is kept, and the same command resumes."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h: launchers restart the job."""


def require(module: str, extra: str) -> ModuleType:
    """Imports `module`, which belongs to the optional extra `extra`.

    Raises:
      UserError: the module is not installed; names the extra to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"this needs the Python package {module.split('.')[0]!r}, which is not installed ({error}); "
            f"install the extra: pip install 'mlpmem_jax[{extra}]'"
        ) from error
