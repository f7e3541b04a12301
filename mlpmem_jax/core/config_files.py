"""Config files: finds, runs, overrides from the command line, and checks them.

A config file is Python that defines `get_config()`; a sweep file defines `get_sweep()`. It is looked up at its path
(possibly in a bucket), and then among the ready configs that are installed with the package. Inside such a file,
`from configs import default` imports the ready configs, whatever else may be called `configs`.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType

import ml_collections
from absl import flags
from ml_collections import config_flags

from mlpmem_jax.core import storage
from mlpmem_jax.core.config import check_config, expand_home, first_unknown, settle
from mlpmem_jax.core.errors import ConfigError, UserError
from mlpmem_jax.core.installation import READY

_IS_OTHER = {
    "get_config": "; it is the config of a sweep: mlpmem sweep --config",
    "get_sweep": "; it is the config of one run: mlpmem run --config",
}


def path_option(text: str) -> str:
    """The argparse type of options that name a file or folder, possibly in a bucket: expands ~."""
    return _checked(text, storage.check_url)


def local_path_option(text: str) -> str:
    """The argparse type of options that name a file or folder on this machine: expands ~."""
    return _checked(text, storage.check_local)


def _checked(text: str, check: Callable[[str], None]) -> str:
    try:
        check(path := expand_home(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def read(file: str, overrides: Sequence[str]) -> ml_collections.ConfigDict:
    """The resolved and checked config of a file and `--config.key=value` overrides.

    Raises:
      ConfigError: the file cannot be read, a key does not exist, or a value is not allowed.
    """
    return override(file, load(file, "get_config"), overrides)


def load(file: str, function: str):
    """The return value of a config file's `function()`.

    Args:
      file: path or URL; a relative path that does not exist is looked up next to the installed package.
      function: "get_config" or "get_sweep".

    Raises:
      ConfigError: there is no such file, it cannot be run, or it does not define `function`.
    """
    text, source = _read(file)
    module = {"__name__": "mlpmem_config", "__file__": source}
    try:
        with _ready_configs():
            exec(compile(text, source, "exec"), module)
            make: Callable | None = module.get(function)
            if make is None:
                other = "get_sweep" if function == "get_config" else "get_config"
                raise ConfigError(f"{file}: has no {function}(){_IS_OTHER[function] if other in module else ''}")
            return make()
    except ConfigError:
        raise
    except SyntaxError as error:
        raise ConfigError(f"{file}: line {error.lineno}: {type(error).__name__}: {error.msg}") from error
    except Exception as error:
        raise ConfigError(f"{file}: cannot be run ({type(error).__name__}: {error})") from error


@contextlib.contextmanager
def _ready_configs() -> Iterator[None]:
    """Within the context, `configs` is the package of ready configs; afterwards it is restored."""

    def take() -> dict[str, ModuleType]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "configs"}

    outer = take()
    sys.path.insert(0, str(READY))
    try:
        yield
    finally:
        sys.path.remove(str(READY))
        take()
        sys.modules.update(outer)


def _read(file: str) -> tuple[bytes, str]:
    """The content of a config file, and its location."""
    ready = "configs/ and configs/sweeps/ of the package hold ready ones, e.g. --config=configs/quickstart.py"
    if storage.is_remote(file):
        from etils import epath  # imports NumPy, which local configs do not need

        storage.prepare(file)
        place = epath.Path(file)
    else:
        place = pathlib.Path(file)
        if not place.exists() and not place.is_absolute() and (READY / file).is_file():
            place = READY / file
    try:
        return place.read_bytes(), str(place)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"--config={file}: no such file; {ready}") from error
    except IsADirectoryError as error:
        raise ConfigError(f"--config={file}: is a folder, expected a Python file; {ready}") from error
    except OSError as error:
        raise ConfigError(f"--config={file}: cannot be read ({error.strerror or error})") from error


def override(file: str, config: ml_collections.ConfigDict, words: Sequence[str]) -> ml_collections.ConfigDict:
    """Applies command-line overrides to a config, resolves paths under ~, and checks it.

    Args:
      file: the config's file, for messages.
      config: the result of `load`; not modified.
      words: `--config.GROUP.KEY=VALUE`, or with the value as a separate word.

    Raises:
      ConfigError: a word is not an override, a key does not exist, or a value is not allowed or has no effect.
    """
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(f"{file}: get_config(): expected an ml_collections.ConfigDict, found {type(config).__name__}")
    words = joined(words)
    result = config.copy_and_resolve_references()
    values = flags.FlagValues()
    arguments = ["mlpmem", *words]
    try:
        config_flags.DEFINE_config_dict("config", result, flag_values=values, sys_argv=arguments)
        values(arguments)
        result = values["config"].value
    except (AttributeError, KeyError, flags.Error, TypeError, ValueError) as error:
        unknown = first_unknown(words)
        raise unknown or ConfigError(f"{file} {' '.join(words)}: {_last_line(error)}") from error
    except (SyntaxError, RecursionError, MemoryError, OverflowError) as error:
        raise ConfigError(f"{file} {' '.join(words)}: not a value ({type(error).__name__})") from error
    settle(result, config, [_key(word) for word in words])
    check_config(result)
    return result


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def _key(word: str) -> str:
    return word.removeprefix("--config.").split("=", 1)[0]


def joined(words: Iterable[str]) -> list[str]:
    """Joins overrides whose values are separate words.

    Raises:
      ConfigError: a word is not an override.
    """
    result: list[str] = []
    for word in words:
        if word.startswith("--config."):
            result.append(word)
        elif result and "=" not in result[-1] and not word.startswith("--"):
            result[-1] += f"={word}"
        else:
            raise ConfigError(f"{word}: unknown option; see mlpmem --help")
    return result
