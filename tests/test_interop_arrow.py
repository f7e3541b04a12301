"""Arrow streams of the reference: what they hold, the way back, and rows that do not fit."""

import numpy as np
import pyarrow as pa
import pytest
from etils import epath
from interop_data import (
    GPT2,
    LENGTH,
    TARGETS,
    VOCABULARY,
    WIDTH,
    config_for,
    datastore_stream,
    keys_of,
    target_columns,
    write_base,
    write_stream,
    write_tokens,
)
from workdirs import write_datastore

from mlpmem_jax import cli
from mlpmem_jax.core.artifacts import open_artifact
from mlpmem_jax.core.errors import ArtifactError, ConfigError, UserError
from mlpmem_jax.interop import arrow_export, arrow_import
from mlpmem_jax.models import language_model

SEQUENCES = 899 // LENGTH  # whole ones of the training split
POSITIONS = SEQUENCES * LENGTH


def read_stream(file):
    with pa.OSFile(str(file), "rb") as source, pa.ipc.open_stream(source) as reader:
        return reader.schema, reader.read_all().to_pydict()


@pytest.fixture
def work(tmp_path):
    """(config, the next tokens of the training split) of a working directory with tokens and a base."""
    workdir = epath.Path(tmp_path / "work")
    streams = write_tokens(workdir)
    base, _ = write_base(workdir)
    config = config_for(workdir, datastore__input_depth=1.0)
    config.targets.k = 8
    return config, streams, base


def test_datastore_and_targets_come_in_and_go_out_unchanged(work, tmp_path):
    config, streams, _ = work
    following = streams["train"][1:]
    keys = keys_of(len(following))
    source = datastore_stream(tmp_path / "dstore.arrow", following, keys)  # continues past the last whole sequence
    datastore = arrow_import.run(config, "train", source)
    assert datastore.arrays["keys"].shape == (SEQUENCES, LENGTH, WIDTH)
    np.testing.assert_array_equal(datastore.read("keys", 0, SEQUENCES).reshape(-1, WIDTH), keys[:POSITIONS])
    np.testing.assert_array_equal(datastore.read("next_tokens", 0, SEQUENCES).ravel(), following[:POSITIONS])

    columns = target_columns(following[:POSITIONS])
    targets = arrow_import.run(config, "train", write_stream(tmp_path / "knn.arrow", TARGETS, columns))
    assert targets.summary["max_entries"] == max(columns["id_cnt"])
    offsets = targets.read("offsets", 0, SEQUENCES)
    labels = targets.read("label_probabilities", 0, SEQUENCES).ravel()
    for row in (0, 3, 250, POSITIONS - 1):
        sequence, position = divmod(row, LENGTH)
        start, stop = offsets[sequence, position : position + 2]
        assert targets.read_ragged("token_ids", sequence // 2, start, stop).tolist() == columns["token_id"][row]
        probabilities = targets.read_ragged("probabilities", sequence // 2, start, stop)
        assert probabilities.tolist() == columns["prob"][row]
        expected = dict(zip(columns["token_id"][row], columns["prob"][row], strict=True)).get(columns["label"][row], 0)
        assert labels[row] == expected

    arrow_export.export_datastore(config, "train", str(tmp_path / "out" / "dstore.arrow"))
    schema, actual = read_stream(tmp_path / "out" / "dstore.arrow")
    assert schema == pa.schema([("keys", pa.list_(pa.float16(), WIDTH)), ("vals", pa.int32())])
    np.testing.assert_array_equal(np.array(actual["keys"], np.float16), keys[:POSITIONS])
    assert actual["vals"] == following[:POSITIONS].tolist()
    arrow_export.export_targets(config, "train", str(tmp_path / "out" / "knn.arrow"))
    schema, actual = read_stream(tmp_path / "out" / "knn.arrow")
    assert schema == TARGETS
    assert actual == columns


def test_streams_export_to_the_same_bytes_after_an_import(work, tmp_path):
    config, streams, _ = work
    following = streams["train"][1 : POSITIONS + 1]
    arrow_import.run(config, "train", datastore_stream(tmp_path / "d.arrow", following))
    arrow_import.run(config, "train", write_stream(tmp_path / "t.arrow", TARGETS, target_columns(following)))
    again = config_for(tmp_path / "again", datastore__input_depth=1.0)
    again.targets.k = 8
    write_tokens(epath.Path(again.workdir))
    write_base(epath.Path(again.workdir))
    for kind in ("datastore", "targets"):
        for round_, settings in (("1", config), ("2", again)):
            out = tmp_path / f"{kind}{round_}.arrow"
            verb = ["export", f"--format=reference-{kind}", f"--output={out}", "--config=unused"]
            cli_run(settings, verb)
            if round_ == "1":
                cli_run(again, ["import", f"--from={out}", "--config=unused"])
        assert (tmp_path / f"{kind}1.arrow").read_bytes() == (tmp_path / f"{kind}2.arrow").read_bytes()


def test_another_stream_of_the_same_name_and_size_is_not_taken_for_the_first(work, tmp_path):
    config, streams, _ = work
    following = streams["train"][1:]
    keys = keys_of(len(following))
    first = arrow_import.run(config, "train", datastore_stream(tmp_path / "d.arrow", following, keys))
    again = arrow_import.run(config, "train", datastore_stream(tmp_path / "d.arrow", following, keys))
    assert again.fingerprint == first.fingerprint
    with pytest.raises(ArtifactError, match=r"config\.imported\.checksum: .* there, .* now"):
        arrow_import.run(config, "train", datastore_stream(tmp_path / "d.arrow", following, -keys))


def cli_run(config, words):
    from mlpmem_jax.interop import commands

    options = cli._parser().parse_args(words)
    if options.verb == "export":
        commands.export(config, options.format, options.output, split=options.split, verify=options.verify)
    else:
        commands.import_any(config, options.source, split=options.split)


def test_a_held_out_datastore_gets_what_the_base_says(work, tmp_path):
    config, streams, base = work
    following = streams["test"][1:]
    arrow_import.run(config, "test", datastore_stream(tmp_path / "d.arrow", following))
    datastore = open_artifact(epath.Path(config.workdir) / "datastore" / "test", "datastore")
    tokens = streams["test"][: 3 * LENGTH].reshape(3, LENGTH)
    logits = np.asarray(language_model.logits(base, GPT2, tokens), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.take_along_axis(log_p, following[: 3 * LENGTH].reshape(3, LENGTH, 1), -1)[..., 0]
    np.testing.assert_allclose(datastore.read("base_log_probabilities", 0, 3), expected, rtol=0, atol=1e-4)


def change(column, row, value):
    def apply(columns):
        columns[column][row] = value

    return apply


@pytest.mark.parametrize(
    ("apply", "named"),
    [
        (lambda columns: columns["label"].__setitem__(301, (columns["label"][301] + 1) % VOCABULARY),
         "row 301: label is .* but the next token there is"),
        (change("id_cnt", 200, 9), "row 200: token_id has .* entries, id_cnt says 9"),
        (change("token_id", 411, [61]), "row 411: token_id has 1 entries"),
        (lambda columns: columns["token_id"][500].__setitem__(0, 61), "row 500: token id 61; the vocabulary has 61"),
        (lambda columns: columns["prob"][500].__setitem__(0, np.float16(-0.5)), "row 500: -0.5 is not a probability"),
        (lambda columns: columns["prob"].__setitem__(500, [np.float16(0.1)] * columns["id_cnt"][500]),
         "row 500: its probabilities sum to"),
        (lambda columns: [column.pop() for column in columns.values()], f"row {POSITIONS - 1}: is missing"),
        (lambda columns: [column.extend(column[:LENGTH]) for column in columns.values()],
         f"row {POSITIONS}: and those after it are more than the tokens"),
    ],
)  # fmt: skip
def test_a_row_of_targets_that_does_not_fit_is_named(work, tmp_path, apply, named):
    config, streams, _ = work
    following = streams["train"][1 : POSITIONS + 1]
    write_next_tokens(config, following)
    columns = target_columns(following)
    apply(columns)
    with pytest.raises(UserError, match=f"knn.arrow: {named}"):
        arrow_import.run(config, "train", write_stream(tmp_path / "knn.arrow", TARGETS, columns))
    with pytest.raises(UserError, match="unfinished"):
        open_artifact(epath.Path(config.workdir) / "targets" / "train", "targets")


def write_next_tokens(config, following):
    """A datastore of next tokens alone: what targets are checked against."""
    arrays = {"next_tokens": np.asarray(following, np.int32).reshape(-1, LENGTH)}
    write_datastore(epath.Path(config.workdir) / "datastore" / "train", arrays, per_shard=2)


def test_a_row_of_a_datastore_that_does_not_fit_is_named(work, tmp_path):
    config, streams, _ = work
    following = streams["train"][1 : POSITIONS + 1].copy()
    keys = keys_of(POSITIONS)
    keys[321, 2] = np.inf
    with pytest.raises(UserError, match="row 321: its key is not finite"):
        arrow_import.run(config, "train", datastore_stream(tmp_path / "a.arrow", following, keys))
    following[123] = (following[123] + 1) % VOCABULARY
    config.workdir = str(tmp_path / "other")
    write_tokens(epath.Path(config.workdir))
    write_base(epath.Path(config.workdir))
    with pytest.raises(UserError, match="row 123: vals is"):
        arrow_import.run(config, "train", datastore_stream(tmp_path / "b.arrow", following))
    config.datastore.input_depth = 0.5
    with pytest.raises(ConfigError, match="only keys of the last block"):
        arrow_import.run(config, "train", str(tmp_path / "b.arrow"))


def test_files_that_are_no_such_streams_are_refused(work, tmp_path):
    config, streams, _ = work
    (tmp_path / "text.arrow").write_text("not arrow")
    with pytest.raises(UserError, match=r"text\.arrow: expected an Arrow stream"):
        arrow_import.run(config, "train", str(tmp_path / "text.arrow"))
    schema = pa.schema([("keys", pa.int32())])
    write_stream(tmp_path / "keys.arrow", schema, {"keys": [1]})
    with pytest.raises(UserError, match=r"has the columns keys; expected id_cnt, token_id, prob, label \(targets\) or"):
        arrow_import.run(config, "train", str(tmp_path / "keys.arrow"))
    following = streams["train"][1 : POSITIONS + 1]
    source = datastore_stream(tmp_path / "cut.arrow", following)
    content = (tmp_path / "cut.arrow").read_bytes()
    (tmp_path / "cut.arrow").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cut\.arrow: row \d+: could not be read \(truncated\?\)"):
        arrow_import.run(config, "train", source)
