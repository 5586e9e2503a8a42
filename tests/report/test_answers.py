"""Answers side by side: the words that differ stand out."""

import re

import pytest

from phi3_jax.report.answers import compared
from tests.helpers.rendered import macro


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
