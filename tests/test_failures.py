"""However a command ends, its last line says why, and its exit code tells what kind of end it was."""

import errno
import io
import os
import signal
import sys

import pytest

from mlpmem_jax import cli
from mlpmem_jax.core import failures
from mlpmem_jax.core.errors import ArtifactError, Stopped


def raised(error, cause=None):
    try:
        if cause is not None:
            try:
                raise cause
            except type(cause):
                raise error  # noqa: B904  libraries do not say `from` either
        raise error
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ArtifactError("tokens: unfinished"), 2, "mlpmem run: error: tokens: unfinished"),
        (Stopped("asked"), 75, "mlpmem run: error: asked"),
        (KeyboardInterrupt(), 130, "mlpmem run: error: stopped by Ctrl-C. Completed work is kept"),
        (OSError(errno.ENOSPC, "full", "/runs/a"), 2, "error: /runs/a: No space left on device; free some space"),
        (PermissionError(errno.EACCES, "no", "/runs"), 2, "error: /runs: Permission denied; fix the permissions"),
        (
            OSError(errno.EROFS, "no", b"/r\xe9"),
            2,
            r"error: /r\udce9: Read-only file system; choose a writable location",
        ),
        (NotADirectoryError(errno.ENOTDIR, "no", "/a/b"), 2, "error: /a/b: Not a directory; a file is in the way"),
        (
            raised(
                ImportError("sys.meta_path is None"), raised(ValueError("ABORTED"), OSError(errno.ENOSPC, "", "/c"))
            ),
            2,
            "error: /c: No space left on device",
        ),
        (
            ValueError("FAILED: writing /d/0: No space left on device [source locations='...']"),
            2,
            "/d/0: No space left",
        ),
        (
            ValueError(f"Error writing {500 * 'x'}: No space left on device [source locations='...']"),
            2,
            "error: No space left on device: Error writing xxx",
        ),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"),
            2,
            "this machine has not enough memory",
        ),
        (
            ValueError("invalid truth value 'abc' for environment 'JAX_ENABLE_X64'"),
            2,
            "error: JAX refuses an environment variable: invalid truth value 'abc'",
        ),
        (
            ZeroDivisionError("division by zero"),
            1,
            "mlpmem run: error: this is a bug of mlpmem_jax: please open an issue",
        ),
    ],
)
def test_the_last_line_and_the_exit_code(error, code, line, capsys, monkeypatch):
    failures.print_anything()
    with pytest.raises(SystemExit) as stopped, failures.reported("mlpmem run"):
        raise error
    assert stopped.value.code == code
    lines = capsys.readouterr().err.splitlines()
    assert line in lines[-1]
    assert (len(lines) == 1) == (code != failures.BUG)
    if code == failures.BUG:
        assert lines[0].startswith("Traceback")
        assert "Python 3." in lines[-1]
        assert "jax 0." in lines[-1]


def test_output_that_nobody_reads_is_no_bug(capfd, monkeypatch):
    """What `| head -1` leaves in the buffer would otherwise fail when Python exits."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(os.dup(1), "w") as kept, open(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as stopped, failures.reported("mlpmem run"):
            print("a line")
        os.dup2(kept.fileno(), 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), write)
    assert stopped.value.code == 128 + signal.SIGPIPE
    assert capfd.readouterr().err == ""


class Raising:
    """Raises where nobody can catch it."""

    def __init__(self, error):
        self.error = error

    def __del__(self):
        raise self.error


def test_reads_that_were_given_up_end_in_silence(capsys, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    with failures.reported("mlpmem run"):
        pass
    Raising(RuntimeError("Event loop is closed"))
    assert capsys.readouterr().err == ""
    Raising(ValueError("another"))
    assert "ValueError: another" in capsys.readouterr().err


def test_a_terminal_that_knows_ascii_alone_is_no_reason_to_stop(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    failures.print_anything()
    print("λ — ünïcode")
    stream.flush()
    assert stream.buffer.getvalue() == rb"\u03bb \u2014 \xfcn\xefcode" + b"\n"


def test_a_prompt_that_is_not_utf_8_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", "--config=configs/smoke.py", "--prompt=caf\udce9"])
    assert stopped.value.code == 2
    assert r"--prompt: 'caf\udce9': is not UTF-8" in capsys.readouterr().err
