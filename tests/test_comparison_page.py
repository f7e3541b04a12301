"""What the page of a comparison says, from figures written down by hand."""

import json

import pytest
from etils import epath

from mlpmem_jax.comparison import page


def comparison(questions, low, high):
    of = {"over base": {"accuracy": [low, high]}}
    task = {
        "title": "RT",
        "headline": "accuracy",
        "tuned on": "accuracy",
        "questions": questions,
        "differences": {"accuracy": []},
    }
    return {
        "tasks": {"rt": task | {"systems": {"base": {}, "memory": of}}},
        "systems": {"base": {"title": "base LM"}, "memory": {"title": "base LM + memory"}},
    }


@pytest.mark.parametrize(
    ("questions", "low", "high", "expected"),
    [
        (
            50,
            0.1,
            0.2,
            "1 are gains that the data support, 0 are losses; the other 0",
        ),
        (
            50,
            -0.2,
            -0.1,
            "0 are gains that the data support, 1 are losses; the other 0",
        ),
        (50, -0.1, 0.2, "0 are gains that the data support, 0 are losses; the other 1 may be chance"),
        (2, 0.1, 0.1, "0 are gains that the data support, 0 are losses; the other 1 may be chance"),
    ],
)
def test_the_verdict_counts_what_the_data_support(questions, low, high, expected):
    assert expected in page.verdict(comparison(questions, low, high))


def test_a_page_without_anything_is_a_page():
    assert "<h1>" in page.page(None, [])


def test_answers_with_any_line_separator_are_read(tmp_path, monkeypatch):
    """Python also splits texts at U+2028 and U+0085, which JSON does not escape."""
    answers = [{"task": "t", "text": "one\u2028two\x85three"}]
    folder = epath.Path(tmp_path)
    (folder / "compare.json").write_text("{}")
    (folder / "answers.jsonl").write_bytes((json.dumps(answers[0], ensure_ascii=False) + "\n").encode())
    shown = []
    monkeypatch.setattr(page, "_read", lambda file: {} if file.stem == "speed" else {"tasks": {}})
    monkeypatch.setattr(page, "page", lambda comparison, lines, speed: shown.append(lines) or "")
    page.write(folder)
    assert shown == [answers]
