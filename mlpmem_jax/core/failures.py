"""How a command fails: one last line that gives the reason, and a specific exit code."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import os
import platform
import signal
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn

from mlpmem_jax.core.errors import UserError

BUG = 1
"""Exit code for bugs of the program."""
INTERRUPTED = 128 + signal.SIGINT

_KEPT = "Completed work is kept: run the same command again"
_ADVICE = {
    # Advice by the file system's error number.
    errno.ENOSPC: f"free some space. {_KEPT}",
    errno.EDQUOT: f"free some space. {_KEPT}",
    errno.EROFS: "choose a writable location",
    errno.EACCES: "fix the permissions, or choose another location",
    errno.EPERM: "fix the permissions, or choose another location",
    errno.ENOTDIR: "a file is in the way; move it, or choose another location",
    errno.EEXIST: "it is in the way; move it, or choose another location",
    errno.EISDIR: "a file is expected there; move the folder, or choose another location",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "a link leads back to itself; remove it",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOENT: "it is missing; if it was there, something else removed it",
    errno.EIO: f"the disk or the network failed. {_KEPT}",
    errno.ESTALE: f"the disk or the network failed. {_KEPT}",
}
_SMALLER = "raise accumulation_steps, or lower loss_chunk, datastore.batch_sequences or targets.key_shard_rows"
_UNMISTAKABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EIO, errno.ENAMETOOLONG)
"""Error numbers whose text is unambiguous, so that it identifies errors of C++ libraries."""


def print_anything() -> None:
    """Makes standard output and error accept any text: characters outside the terminal's encoding are escaped.

    Streams that the caller has closed (`>&-`) discard everything. Left closed, their numbers would go to the next files
    that are opened, and what C++ libraries print would end up in those.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.open(os.devnull, os.O_RDWR), "r+"))  # noqa: SIM115  the lowest free number
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def reported(program: str) -> Iterator[None]:
    """Within the context, any failure raises SystemExit, after one line on standard error.

    Args:
      program: prefix of the line, e.g. "mlpmem run".

    Raises:
      SystemExit: with the code of a `UserError`; 2 for file system errors and insufficient memory; 130 after Ctrl-C;
        and 1, with a traceback, for everything else.
    """
    sys.unraisablehook = _print_unraisable  # permanently: abandoned reads may end after this context
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        _end(program, f"stopped by Ctrl-C. {_KEPT}", INTERRUPTED)
    except BrokenPipeError:  # the reader of the output has closed it
        _exit(128 + signal.SIGPIPE)
    except UserError as error:
        _end(program, str(error), error.exit_code)
    except Exception as error:
        text = outside_cause(error)
        if text is None:
            traceback.print_exception(error)
            _end(program, bug(), BUG)
        _end(program, text, UserError.exit_code)


def _print_unraisable(event) -> None:
    """Prints errors that cannot be caught, except those of abandoned reads.

    If one of the reads of a checkpoint fails, Orbax closes the asyncio loop that all of them report to.
    """
    if str(event.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(event)


def _end(program: str, text: str, code: int) -> NoReturn:
    with contextlib.suppress(OSError):
        print(f"{program}: error: {text}", file=sys.stderr)
    _exit(code)


def _exit(code: int) -> NoReturn:
    """Exits with the code even if standard output cannot be written, after which Python itself would exit with 120."""
    try:
        sys.stdout.flush()
    except OSError:
        discard_output()
    sys.exit(code)


def discard_output() -> None:
    """Discards standard output from now on, including what could not be written yet."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def bug() -> str:
    """The last line after a traceback."""
    versions = [f"{name} {_version(name)}" for name in ("mlpmem_jax", "jax")]
    return (
        "this is a bug of mlpmem_jax: please open an issue in its repository, with the lines above, the command and "
        f"{', '.join([*versions, f'Python {platform.python_version()}', platform.platform()])}"
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def chain(error: BaseException) -> list[BaseException]:
    """An error and its causes, ending with the first cause."""
    errors: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in errors:
        errors.append(following)
        following = following.__cause__ or following.__context__
    return errors


def outside_cause(error: BaseException) -> str | None:
    """A description of the file system's or machine's failure, if that is the first cause of an error; else None."""
    for each in reversed(chain(error)):
        if isinstance(each, MemoryError) or "RESOURCE_EXHAUSTED: Out of memory" in str(each):
            return f"this machine has not enough memory ({_first_line(each)}); {_SMALLER}"
        if "Unable to initialize backend" in str(each):
            return f"JAX finds no such accelerator: {_first_line(each)}; unset JAX_PLATFORMS, or install what it names"
        if "for JAX flag" in str(each) or "for environment 'JAX_" in str(each):
            return f"JAX refuses an environment variable: {_first_line(each)}; correct or unset it"
        if isinstance(each, OSError) and each.errno in _ADVICE:
            named = each.filename is not None
            text = f"{_printable(each.filename)}: {os.strerror(each.errno)}" if named else each.strerror
            return f"{text}; {_ADVICE[each.errno]}"
        for number in _UNMISTAKABLE:
            if os.strerror(number) in str(each):
                line, reason = _first_line(each), os.strerror(number)
                return f"{line if reason in line else f'{reason}: {line} ...'}; {_ADVICE[number]}"
    return None


def _printable(name) -> str:
    return os.fsdecode(name) if isinstance(name, bytes) else str(name)


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0].split(" [", 1)[0][:400] if lines else type(error).__name__
