"""However a command ends, its last line says why, and its exit code tells what kind of end it was."""

import errno
import io
import os
import pathlib
import resource
import signal
import subprocess
import sys

import pytest

from mlpmem_jax import cli
from mlpmem_jax.core import failures, stage_costs
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
        (OSError(errno.ENOSPC, "No space left on device"), 2, "mlpmem run: error: No space left on device; free some"),
        (
            FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"),
            2,
            "error: No usable temporary directory found in ['/tmp']; it is missing",
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


CLOSED = """
import os
from mlpmem_jax.core import failures

failures.print_anything()
with failures.reported("mlpmem run"), open("data", "wb") as file:
    file.write(b"data")
    file.flush()
    os.write(1, b"said by C++")
    os.write(2, b"said by C++")
    print("said")
    raise failures.UserError("wrong")
"""


def test_closed_output_does_not_end_in_a_file(tmp_path):
    """A shell's `>&-` frees the number of standard output for the next file."""
    source = f"cd {tmp_path}; exec {sys.executable} -c '{CLOSED}' <&- >&- 2>&-"
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    done = subprocess.run(["bash", "-c", source], env=environment, check=False)
    assert done.returncode == 2
    assert (tmp_path / "data").read_bytes() == b"data"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_output_on_a_full_disk_keeps_the_exit_code():
    """Python itself exits with 120 if it cannot write the rest of the output."""
    source = 'from mlpmem_jax.core import failures\nwith failures.reported("mlpmem run"):\n    print("said")'
    root = pathlib.Path(__file__).parents[1]
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", source]
        done = subprocess.run(command, cwd=root, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("mlpmem run: error: No space left on device; free some space")
    assert len(done.stderr.splitlines()) == 1


def test_costs_survive_a_full_disk(tmp_path):
    with stage_costs.measured(str(tmp_path), "base"):
        pass
    before = (tmp_path / "stages.jsonl").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with stage_costs.measured(str(tmp_path), "datastore"):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "stages.jsonl").read_bytes() == before
    (tmp_path / "stages.jsonl").write_bytes(b'{"stage": "targets"}\n\xff\n[]\n' + before)
    assert list(stage_costs.totals(tmp_path)["seconds"]) == ["base"]


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
