"""metrics.jsonl: appended to, each step once over all restarts, and few large writes where the folder is a bucket."""

import json
import threading

import pytest

from mlpmem_jax.training import metrics


def steps(content):
    return [json.loads(line)["step"] for line in content.splitlines()]


def test_records_are_appended(tmp_path):
    file, other = tmp_path / metrics.FILE, b'{"step": 1, "note": 1.0}\n'
    writer = metrics.MetricsWriter(tmp_path, 0)
    writer.write(1, {"loss": 2.0})
    writer.write(2, {"loss": 1.5})
    writer.close()
    writer = metrics.MetricsWriter(tmp_path, 2)
    with file.open("ab") as opened:
        opened.write(other)  # would be lost if the file were written anew
    writer.write(3, {"loss": 1.0})
    writer.close()
    assert file.read_bytes() == b"".join(
        [b'{"step": 1, "loss": 2.0}\n', b'{"step": 2, "loss": 1.5}\n', other, b'{"step": 3, "loss": 1.0}\n']
    )
    assert steps(b"\n".join(json.dumps(record).encode() for record in writer.records())) == [1, 2, 3]


@pytest.mark.parametrize("end", [b"", b'{"step": 60, "lo', b'{"step": 60}'])
def test_a_resumed_run_has_each_step_once(tmp_path, end):
    records = [b'{"step": 20}\n', b'{"step": 40}\n', b'{"step": 40, "clock": 1.0}\n', b'{"step": 45}\n']
    (tmp_path / metrics.FILE).write_bytes(b"".join(records) + end)
    writer = metrics.MetricsWriter(tmp_path, 40)
    writer.write(45, {"loss": 1.0})
    writer.close()
    assert steps((tmp_path / metrics.FILE).read_bytes()) == [20, 40, 40, 45]


def test_a_damaged_line_costs_no_other(tmp_path):
    """Zeros are what some file systems leave where a machine went down."""
    content = b'{"step": 20}\n{"st\xff": 40}\n' + 12 * b"\0" + b'\n{"step": 60}\n'
    (tmp_path / metrics.FILE).write_bytes(content)
    writer = metrics.MetricsWriter(tmp_path, 60)
    writer.write(80, {"loss": 1.0})
    writer.close()
    assert (tmp_path / metrics.FILE).read_bytes() == content + b'{"step": 80, "loss": 1.0}\n'
    assert [record["step"] for record in writer.records()] == [20, 60, 80]


def test_a_bucket_is_written_to_with_checkpoints_and_not_waited_for(monkeypatch):
    written, free = [], threading.Event()

    class Bucket:
        def __init__(self, path):
            pass

        def __truediv__(self, name):
            return self

        def exists(self):
            return True

        def read_bytes(self):
            return b'{"step": 20}\n{"step": 40}\n'

        def write_bytes(self, content):
            free.wait()
            written.append(steps(content))

    monkeypatch.setattr(metrics.epath, "Path", Bucket)
    writer = metrics.MetricsWriter("gs://bucket/memory", 20)
    for step in range(40, 101, 20):
        writer.write(step, {"loss": 1.0})
        if step == 60:
            writer.flush()
    assert written == []  # and yet every call has returned
    free.set()
    writer.close()
    assert written == [[20, 40, 60], [20, 40, 60, 80, 100]]


def test_a_full_disk_is_told(tmp_path):
    writer = metrics.MetricsWriter(tmp_path, 0)
    (tmp_path / metrics.FILE).symlink_to("/dev/full")
    writer.write(1, {"loss": 1.0})
    with pytest.raises(OSError, match="No space left"):
        writer.close()
