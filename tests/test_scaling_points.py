"""Points of a sweep: what is read, how seeds and budgets are gathered, and one clear error for each thing wrong."""

import numpy as np
import pytest

from mlpmem_jax.core.errors import UserError
from mlpmem_jax.scaling import points

HEADER = "arm,parameters,tokens,flops,perplexity,seed"
GOOD = [f"continued,{n},1e9,{6e9 * n},{p},0" for n, p in ((1000000, 30.0), (3000000, 25.0), (10000000, 20.0))]


@pytest.fixture
def sweep_file(tmp_path):
    def write(rows, header=HEADER):
        (tmp_path / "points.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
        return tmp_path / "points.csv"

    return write


def test_seeds_are_averaged_in_logarithms_and_other_columns_passed_over(sweep_file):
    rows = [f"{row},{n}" for n, row in enumerate([*GOOD, GOOD[0].replace("30.0,0", "40.0,1")])]
    sweep = points.read(sweep_file(rows, HEADER + ",note"))
    runs = sweep.arms["continued"]
    assert (sweep.rows, sweep.corpus, len(runs)) == (4, None, 3)
    assert runs.seeds_R.tolist() == [2, 1, 1]
    assert np.exp(runs.losses_R[0]) == pytest.approx(np.sqrt(30.0 * 40.0))
    assert runs.squares_R[0] == pytest.approx(0.5 * np.log(40.0 / 30.0) ** 2)
    np.testing.assert_array_equal(sweep.points["continued"][:, 2], [30.0, 25.0, 20.0, 40.0])


def test_columns_in_any_order_with_byte_order_mark_and_blank_lines(tmp_path):
    text = "﻿seed, perplexity ,flops,tokens,parameters,arm,corpus\r\n"
    for n in (1, 2, 3):
        text += f"0,{40 - n},1e15,1e9,{n}e6, a ,web\r\n\r\n"
    (tmp_path / "p.csv").write_text(text, encoding="utf-8", newline="")
    sweep = points.read(tmp_path / "p.csv")
    assert sweep.corpus == "web"
    assert sweep.arms["a"].parameters_R.tolist() == [1e6, 2e6, 3e6]


def test_budgets_gather_runs_of_about_equal_compute():
    flops_R = np.array([3e15, 1.05e15, 1e15, 3.2e15, 1.099e15, 1.2e15])
    runs = points.Runs(*[np.arange(1.0, 7.0)] * 2, flops_R, np.arange(6.0)[::-1], *[np.ones(6)] * 2)
    assert runs.budgets().tolist() == [2, 0, 0, 2, 0, 1]
    assert runs.best(runs.budgets()).flops_R.tolist() == [1.099e15, 1.2e15, 3.2e15]


def changed(row, column, value):
    cells = row.split(",")
    cells[HEADER.split(",").index(column)] = value
    return ",".join(cells)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("perplexity", "0"),
        ("perplexity", "-3"),
        ("perplexity", "nan"),
        ("perplexity", "inf"),
        ("perplexity", "many"),
        ("perplexity", ""),
        ("parameters", "0"),
        ("tokens", "-1"),
        ("flops", "x"),
        ("seed", "1.5"),
        ("arm", ""),
    ],
)
def test_a_value_that_cannot_be_is_named_by_row_and_column(sweep_file, column, value):
    with pytest.raises(UserError) as error:
        points.read(sweep_file([GOOD[0], changed(GOOD[1], column, value), GOOD[2]]))
    assert "row 3" in str(error.value)
    assert repr(column) in str(error.value)
    assert "points.csv" in str(error.value)


def test_a_missing_column_is_named(sweep_file):
    with pytest.raises(UserError, match="lacks the columns perplexity, seed"):
        points.read(sweep_file([], "arm,parameters,tokens,flops,ppl"))


@pytest.mark.parametrize(
    ("rows", "header", "words"),
    [
        ([], HEADER, "no points below the header"),
        ([*GOOD, "continued,1,2"], HEADER, "row 5 has 3 cells"),
        ([*GOOD, GOOD[1]], HEADER, "rows 3 and 5 are the same point"),
        (GOOD[:2], HEADER, "arm 'continued' has too few sizes: 1e+06, 3e+06"),
        ([*GOOD, GOOD[0].replace("continued", "b")], HEADER, "arm 'b' has too few sizes"),
        (
            [f"{row},{c}" for row, c in zip(GOOD, "wwx", strict=True)],
            HEADER + ",corpus",
            "'w' in row 2 and 'x' in row 4",
        ),
        (GOOD, HEADER + ",seed", "names the column 'seed' twice"),
    ],
)
def test_points_that_cannot_be_fitted(sweep_file, rows, header, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(").replace("+", r"\+")):
        points.read(sweep_file(rows, header))


def test_files_that_are_not_points(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        points.read(tmp_path / "absent.csv")
    (tmp_path / "long.csv").write_text("arm,parameters,tokens,flops,perplexity,seed\n" + "x" * 200_000)
    with pytest.raises(UserError, match=r"long\.csv: expected CSV: field larger than"):
        points.read(tmp_path / "long.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        points.read(tmp_path / "binary.csv")


def test_one_size_over_several_budgets_is_a_law_in_compute_alone(sweep_file):
    rows = [f"a,1e9,{c / 6e9},{c},{p},0" for c, p in ((1e18, 20.0), (3e18, 18.0), (1e19, 16.0))]
    with pytest.raises(UserError, match="against='flops'"):
        points.read(sweep_file(rows))
    assert len(points.read(sweep_file(rows), against="flops").arms["a"]) == 3
    with pytest.raises(UserError, match="too few budgets"):
        points.read(sweep_file(rows[:2]), against="flops")
