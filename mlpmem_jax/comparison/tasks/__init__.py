"""Tasks, found by the names of their files: NAME.py has a `TASK`, NAME.toml describes a choice among words.

To add a task, add a file here, or pass the path of a file elsewhere. docs/extending.md shows two examples.
"""

from __future__ import annotations

import importlib
import pathlib
import runpy

from mlpmem_jax.comparison.question import Task
from mlpmem_jax.comparison.tasks import _words
from mlpmem_jax.core.errors import ConfigError, UserError

_FOLDER = pathlib.Path(__file__).parent


def names() -> list[str]:
    """The names of all tasks."""
    return sorted(file.stem for file in _FOLDER.iterdir() if file.suffix in (".py", ".toml") and file.stem[0] != "_")


def _task_of(file: str) -> Task:
    module = runpy.run_path(file)
    if not isinstance(module.get("TASK"), Task):
        raise ConfigError(f"comparison task {file!r}: has no TASK, a comparison.question.Task")
    return module["TASK"]


def find(name: str) -> Task:
    """The task with a name, or from a file: PATH.toml or PATH.py.

    Raises:
      ConfigError: the task does not exist.
    """
    file = pathlib.Path(name)
    if file.suffix in (".toml", ".py"):
        if not file.is_file():
            raise ConfigError(f"comparison task {name!r}: file not found")
        try:
            return _words.read(file) if file.suffix == ".toml" else _task_of(name)
        except UserError:
            raise
        except Exception as error:  # the file is the user's program, or TOML
            raise ConfigError(f"comparison task {name!r}: cannot be read ({type(error).__name__}: {error})") from error
    if name not in names():
        raise ConfigError(f"comparison task {name!r}: unknown task; expected some of {', '.join(names())}")
    if (described := _FOLDER / f"{name}.toml").exists():
        return _words.read(described)
    return importlib.import_module(f"{__name__}.{name}").TASK
