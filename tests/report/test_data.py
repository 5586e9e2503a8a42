"""The data of a report: lengths, and what the positions hold."""

import pytest

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
