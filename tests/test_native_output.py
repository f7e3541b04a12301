"""What C++ libraries print is silenced, their end is not."""

import signal
import subprocess
import sys

SILENCED = """
import os
from mlpmem_jax.core import native_output

with native_output.silenced_standard_error():
    os.write(2, b"said by C++")
    {}
os.write(2, b"said later")
"""


def run(line):
    return subprocess.run([sys.executable, "-c", SILENCED.format(line)], capture_output=True, text=True, check=False)


def test_an_abort_in_silence_says_where():
    done = run("os.abort()")
    assert done.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in done.stderr
    assert "said by" not in done.stderr


def test_silence_ends():
    assert run("pass").stderr == "said later"
