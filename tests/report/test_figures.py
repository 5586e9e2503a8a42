"""Figures of a report: tiles of before and after, and a column for each model."""

import re

from phi3_jax.report.write import write_evaluation_report
from tests.helpers.pages import evaluation_report
from tests.helpers.rendered import page, report


def test_a_worse_result_is_not_shown_as_a_better_one(tmp_path):
    before = {"eval_loss": 1.0, "eval_perplexity": 2.7, "eval_token_accuracy": 0.5, "exact_match": 0.5}
    after = {"eval_loss": 2.0, "eval_perplexity": 2.7, "eval_token_accuracy": 0.4, "exact_match": 0.6}
    page = report(tmp_path, before=before, after=after)
    notes = [a["class"] for tag, a in page.elements if a.get("class", "").startswith("note ")]
    assert notes == ["note worse", "note same", "note worse", "note better"]


def test_shares_are_drawn_on_the_whole_way_from_none_to_all(tmp_path):
    changes = {"exact_match": 0.0, "exact_match_interval": (0.0, 0.5)}, {"exact_match": 1.0}
    page = report(tmp_path, before=changes[0], after=changes[1])
    dots = [a for tag, a in page.elements if tag == "circle" and a["r"] == "4"]
    lines = [a for tag, a in page.elements if tag == "line" and a["class"] == "quiet"]
    assert [(dot["class"], dot["cx"]) for dot in dots] == [("quiet", "6.0"), ("train", "194.0")]
    assert [(line["x1"], line["x2"]) for line in lines] == [("6.0", "100.0")]


def test_an_evaluation_has_a_column_for_each_model(tmp_path):
    shown = page(tmp_path, write_evaluation_report, evaluation_report())
    for words in (
        "3 models on chats.jsonl",
        "Exact match0.0%[0.0%, 10.0%]33.3%[23.3%, 43.3%]p\u00a0<\u00a00.00166.7%",
        "Loss1.00001.33331.6667",
        "some checknot measured0.3333",
        "1 right in some · 1 wrong",
        "model-2 ✗ wrong",
    ):
        assert words in shown.text.replace("\n", ""), words
    html = (tmp_path / "report.html").read_text()
    assert re.findall(r'class="value best">([^<]*)', html) == ["66.7%", "1.0000", "0.6667"]
