"""One process at a time works in a working directory; who died there does not keep it."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from mlpmem_jax.core import lock
from mlpmem_jax.core.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
HOLDS = "import sys, time; from mlpmem_jax.core import lock\nwith lock.held(sys.argv[1]): print('held'), time.sleep(60)"


@pytest.fixture
def other(tmp_path):
    """Another process that works in tmp_path."""
    process = subprocess.Popen([sys.executable, "-uc", HOLDS, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def write(folder, **changes):
    """The file of a holder that is not this process."""
    holder = dataclasses.replace(lock.Holder.this_process(), **changes)
    (folder / lock.FILE).write_text(json.dumps({"holder": dataclasses.asdict(holder)}))


def test_the_second_is_told_at_once_who_works_there(tmp_path, other):
    taken = pytest.raises(UserError, match=rf"{tmp_path}: process {other.pid} on .*, since 20.*, works there")
    with taken, lock.held(str(tmp_path)):
        pass
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    with lock.held(str(tmp_path)):  # the dead keep nothing
        assert json.loads((tmp_path / lock.FILE).read_text())["holder"]["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_another_process_of_the_same_number_is_not_the_holder(tmp_path):
    write(tmp_path, started="1")
    with lock.held(str(tmp_path)):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"holder": {"host": "a"}}'])
def test_a_damaged_file_keeps_nobody_out(tmp_path, content):
    (tmp_path / lock.FILE).write_text(content)
    with lock.held(str(tmp_path)):
        pass


def test_a_holder_elsewhere_lives_while_it_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "_SILENT_SECONDS", 1.0)
    write(tmp_path, host="far", space="another machine")
    with lock.held(str(tmp_path)):  # it is silent: dead
        time.sleep(0.3)
        assert json.loads((tmp_path / lock.FILE).read_text())["holder"]["pid"] == os.getpid()

    finished = threading.Event()

    def beat():
        while not finished.wait(0.1):
            write(tmp_path, host="far", space="another machine", since=str(time.time()))

    write(tmp_path, host="far", space="another machine")
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="on far, since"), lock.held(str(tmp_path)):
            pass
    finally:
        finished.set()
        thread.join()


def test_a_file_system_that_refuses_locks_is_refused_before_any_work(tmp_path, monkeypatch):
    """What TensorStore says there; it can write nothing, nor can Orbax."""

    def take(self):
        raise ValueError(
            'UNAVAILABLE: Failed to acquire lock on file: "/lustre/lock.json.__lock": Failed to lock file: '
            "Function not implemented [os_error_code='38'] [source locations='x']"
        )

    monkeypatch.setattr(lock._Lock, "take", take)
    refused = pytest.raises(UserError, match=r"refuses to lock files \(Function not implemented\), .*Lustre: -o flock")
    with refused, lock.held(str(tmp_path)):
        pass


def test_what_cannot_be_written_is_not_locked(tmp_path):
    (tmp_path / "file").write_text("")
    with lock.held(str(tmp_path / "file" / "run")):
        pass
    with pytest.raises(ZeroDivisionError) as error, lock.held(str(tmp_path / "file" / "run")):
        1 / 0  # noqa: B018
    assert error.value.__context__ is None  # else the refused lock would be told as the first cause
