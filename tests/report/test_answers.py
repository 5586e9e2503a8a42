"""Answers side by side: the words that differ stand out."""

import re

import pytest

from phi3_jax.report.answers import compared
from phi3_jax.report.write import write_evaluation_report
from tests.helpers.pages import evaluation_report
from tests.helpers.rendered import macro, page, report


def marked(a: str, b: str, tag: str) -> tuple[str, str]:
    """Both texts as a page shows them."""
    first, second = (macro("answers.html", "marked", runs, tag) for runs in compared(a, b))
    return first, second


@pytest.mark.parametrize(
    ("a", "b", "left", "right"),
    [
        ("a red mug", "a red mug", "a red mug", "a red mug"),
        ("a red mug", "a blue mug", "a <x>red</x> mug", "a <x>blue</x> mug"),
        ("to the old town", "to a new town", "to <x>the old</x> town", "to <x>a new</x> town"),  # one run
        ("count: 1;", "count: 12;", "count: <x>1</x>;", "count: <x>12</x>;"),
        ("1 < 2 & 3", "1 < 2 & 4", "1 &lt; 2 &amp; <x>3</x>", "1 &lt; 2 &amp; <x>4</x>"),
        ("我爱你", "我爱他", "我爱<x>你</x>", "我爱<x>他</x>"),
        ("abc", "xyz", "abc", "xyz"),  # nothing in common: nothing stands out
        ("", "xyz", "", "xyz"),
    ],
)
def test_the_words_that_differ_are_marked(a, b, left, right):
    assert marked(a, b, "x") == (left, right)


def test_long_answers_are_shown_whole_and_marked_as_far_as_they_are_compared():
    a = " ".join(map(str, range(5000)))
    b = a.replace("17 ", "x ", 1)
    left, right = marked(a, b, "x")
    assert "16 <x>17</x> 18" in left
    for answer, shown in ((a, left), (b, right)):
        assert re.sub("</?x>", "", shown) == answer


def test_answers_that_repeat_themselves_do_not_take_minutes():
    a, b = "the the end " * 3000, "the end the " * 3000
    assert [re.sub("</?x>", "", shown) for shown in marked(a, b, "x")] == [a, b]


def sample(before: str, after: str, reference: str = "yes", prompt: str = "p") -> dict[str, str]:
    return {"prompt": prompt, "reference": reference, "before": before, "after": after}


def test_many_answers_are_folded_away_and_those_left_out_are_counted(tmp_path):
    page = report(tmp_path, samples=[sample("no", "never")] * 50)
    assert "50 still wrong" in page.text
    assert "37 more of 47" in page.text
    assert sum(tag == "article" for tag, _ in page.elements) == 40


def test_answers_that_became_right_or_wrong_come_first_then_the_most_changed(tmp_path):
    samples = [
        sample("yes", "yes", prompt="#1"),
        sample("one two three four", "one two three five", prompt="#2"),
        sample("one two three four", "six seven", prompt="#3"),
        sample("yes", "no", prompt="#4"),
        sample("no", " yes\n", prompt="#5"),
        sample("a", "b", prompt="#6", reference=""),
    ]
    page = report(tmp_path, samples=samples)
    assert re.findall(r"#\d", page.text) == ["#5", "#4", "#3", "#2", "#1", "#6"]
    assert "1 became right · 1 became wrong · 2 still wrong · 1 still right" in page.text


def test_what_the_last_answer_lacks_of_the_reference_is_marked_and_no_reference_repeats_an_answer(tmp_path):
    report(tmp_path, samples=[sample("hm", "count: 21", "count: 12")])
    html = (tmp_path / "report.html").read_text()
    assert "count: <mark>12</mark>" in html
    assert "<h4>Reference" in html
    report(tmp_path, samples=[sample("hm", "count: 12", "count: 12")])
    assert "<h4>Reference" not in (tmp_path / "report.html").read_text()


def test_an_evaluation_of_one_model_has_nothing_to_compare(tmp_path):
    arguments = evaluation_report(models=1)
    del arguments["samples"][1]
    arguments["samples"][0]["right"] = [True]  # by another measure than being equal
    shown = page(tmp_path, write_evaluation_report, arguments)
    assert "1 right" in shown.text
    assert "✓ right" in shown.text
    assert not {"ins", "del"} & {tag for tag, _ in shown.elements}
    assert "best" not in {a.get("class") for _, a in shown.elements}
