"""The data of a report: lengths, and what the positions hold."""

import pytest

from tests.helpers.pages import STATS
from tests.helpers.rendered import report


def test_lengths_have_a_bar_for_each_bin_and_one_for_what_was_cut(tmp_path):
    page = report(tmp_path)
    bars = [a for tag, a in page.elements if tag == "rect" and a["class"] in ("train", "eval") and "height" in a]
    heights = {}
    for style in ("train", "eval"):
        heights[style] = [float(a["height"]) for a in bars if a["class"] == style and a["y"] != "0"]
    train = heights["train"][:3]
    assert train[1] == 0
    assert train[2] / train[0] == pytest.approx(1170 / 300, rel=0.01)
    assert heights["eval"] == [pytest.approx(train[0] / 10, abs=0.1)]  # 30 rows, in the set that lost some
    assert "longer, and cut: 30 rows" in page.text


def test_the_parts_of_the_positions_add_up(tmp_path):
    page = report(tmp_path)
    for words in ("trained on 20.0%", "masked 60.0%", "padding 20.0%"):
        assert words in page.text
    widths = [float(a["width"]) for tag, a in page.elements if tag == "rect" and a["y"] == "0"]
    assert widths == pytest.approx([96, 288, 96] * 2)


LEFT_OUT = [[f"folder/chats.jsonl, row {number}", f"turn {number} has no text"] for number in range(1, 151)]


def test_rows_that_were_left_out_are_listed_with_the_reason(tmp_path):
    named = [["x, row 9", "turn 2: has no content"]]
    stats = {**STATS, "skipped": 2, "invalid": 1_200, "left_out": named + LEFT_OUT}
    page = report(tmp_path, data_stats={"train": stats, "eval": STATS})
    assert "Rows left out of train: 1,202" in page.text
    assert "Rows left out of eval" not in page.text
    assert "x, row 9turn 2: has no content" in page.text
    for where, why in LEFT_OUT[:99]:
        assert f"{where}{why}" in page.text
    assert "row 100" not in page.text
    assert "and 1,102 more" in page.text


def test_what_was_passed_over_and_what_differs_is_counted(tmp_path):
    found = {
        "formats": {"messages": 1490, "text": 10},
        "passed_over": {"id": 1500, "score": 3},
        "literal_rows": 7,
        "first_literal": "folder/chats.jsonl, row 3",
        "length_figures": {"min": 3, "median": 20, "p95": 1234, "max": 4321},
    }
    page = report(tmp_path, data_stats={"train": {**STATS, **found}, "eval": STATS})
    for words in (
        "messages (1,490), text (10)",
        "id (1,500), score (3)",
        "differ from apply_chat_template7, the first chats.jsonl, row 3",
        "shortest 3, median 20, 95 of 100 up to 1,234",
    ):
        assert words in page.text
    nothing = {
        "formats": {},
        "passed_over": {},
        "literal_rows": 0,
        "first_literal": None,
        "remarks": {},
        "invalid": 0,
        "left_out": [],
    }
    before, after = report(tmp_path, data_stats={"a": STATS}), report(tmp_path, data_stats={"a": {**STATS, **nothing}})
    assert before.text == after.text
