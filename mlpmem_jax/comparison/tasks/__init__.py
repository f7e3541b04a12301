"""Tasks, found by the names of their files: NAME.py has a `TASK`, NAME.toml describes a choice among words.

To add a task, add its file, or name it where it lies; nothing else is touched. docs/extending.md shows two.
"""

from __future__ import annotations

import importlib
import pathlib
import runpy

from mlpmem_jax.comparison.question import Task
from mlpmem_jax.comparison.tasks import _words
from mlpmem_jax.core.errors import ConfigError

_FOLDER = pathlib.Path(__file__).parent


def names() -> list[str]:
    """All tasks, by name."""
    return sorted(file.stem for file in _FOLDER.iterdir() if file.suffix in (".py", ".toml") and file.stem[0] != "_")


def find(name: str) -> Task:
    """The task of a name, or of a file: PATH.toml or PATH.py.

    Raises:
      ConfigError: there is none.
    """
    file = pathlib.Path(name)
    if file.suffix in (".toml", ".py"):
        if not file.is_file():
            raise ConfigError(f"comparison task {name!r}: there is no such file")
        return _words.read(file) if file.suffix == ".toml" else runpy.run_path(name)["TASK"]
    if name not in names():
        raise ConfigError(f"comparison task {name!r}: there is no such task; expected some of {', '.join(names())}")
    if (described := _FOLDER / f"{name}.toml").exists():
        return _words.read(described)
    return importlib.import_module(f"{__name__}.{name}").TASK
