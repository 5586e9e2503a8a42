import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from phi3_jax.report.chart import Bar, Series, log_ticks, tick_label, ticks
from tests.helpers.rendered import bar_chart, line_chart


def points(svg: str, style: str) -> list[tuple[float, float]]:
    found = re.search(rf'<polyline class="{style}" points="([^"]*)"', svg)
    assert found
    return [tuple(map(float, pair.split(","))) for pair in found[1].split()]


def test_each_value_is_a_point_in_its_place():
    svg = line_chart([Series("loss", "train", [(0, 0.0), (50, 1.0), (100, 0.5)])], x_label="step", y_label="Loss")
    ElementTree.fromstring(svg)  # well-formed
    (x0, y0), (x1, y1), (x2, y2) = points(svg, "train")
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.1)
    assert y1 < y0  # up is less in SVG


def test_points_lie_within_the_picture_and_the_outermost_ticks():
    svg = line_chart([Series("loss", "train", [(7, 3.21), (993, 0.0004)])], x_label="step", y_label="Loss")
    width, height = map(float, re.search(r'viewBox="0 0 (\d+) (\d+)"', svg).groups())
    assert all(0 < x < width and 0 < y < height for x, y in points(svg, "train"))


def test_values_that_are_not_finite_are_left_out():
    nan, inf = float("nan"), float("inf")
    svg = line_chart([Series("loss", "train", [(1, 2.0), (2, nan), (3, inf), (4, 1.0)])], x_label="x", y_label="y")
    assert len(points(svg, "train")) == 2


def test_nothing_to_draw_is_no_chart():
    assert line_chart([], x_label="x", y_label="y") == ""
    assert line_chart([Series("a", "train", [(1, float("nan"))])], x_label="x", y_label="y") == ""


def test_one_point_and_constant_values_have_a_chart():
    for values in ([(5, 0.0)], [(1, 1e-4), (2, 1e-4)]):
        svg = line_chart([Series("a", "train", values)], x_label="x", y_label="y")
        assert svg.count("<circle") == len(values)


@pytest.mark.parametrize(
    ("low", "high", "whole", "expected"),
    [
        (0, 1, False, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (10, 990, True, [0, 200, 400, 600, 800, 1000]),
        (1, 3, True, [1, 2, 3]),
        (0.51, 2.2, False, [0.5, 1, 1.5, 2, 2.5]),
    ],
)
def test_ticks_are_round_numbers_around_the_values(low, high, whole, expected):
    assert ticks(low, high, whole=whole) == pytest.approx(expected)


def test_tick_labels_are_short():
    assert [tick_label(v) for v in (0, 8e-5, 1e-4, 0.25, 1200, 0.30000000000000004)] == [
        "0",
        "8e-5",
        "1e-4",
        "0.25",
        "1,200",
        "0.3",
    ]


def test_a_fall_over_decades_is_a_straight_line_on_a_log_scale():
    series = [Series("loss", "train", [(0, 10.0), (1, 1.0), (2, 0.1), (3, 0.01)])]
    heights = [y for _, y in points(line_chart(series, x_label="step", y_label="Loss", log=True), "train")]
    assert [b - a for a, b in pairwise(heights)] == pytest.approx([heights[1] - heights[0]] * 3, abs=0.11)
    assert heights[0] < heights[-1]


@pytest.mark.parametrize("values", [[1.0, 0.5], [10.0, 0.0], [10.0, -1.0]])
def test_where_a_log_scale_says_nothing_or_cannot_be_the_scale_is_linear(values):
    series = [Series("loss", "train", list(enumerate(values)))]
    assert line_chart(series, x_label="s", y_label="l", log=True) == line_chart(series, x_label="s", y_label="l")


def test_log_ticks_are_few_powers_of_ten():
    assert log_ticks(0.0048, 11.3) == pytest.approx([1e-3, 1e-2, 1e-1, 1, 10, 100])
    assert log_ticks(1e-12, 1.0)[0] <= 1e-12
    assert 3 <= len(log_ticks(1e-12, 1.0)) <= 8


def test_bars_stand_side_by_side_and_are_as_high_as_their_counts():
    svg = bar_chart([Bar(0, 10, 4, "train", "a <b>"), Bar(10, 20, 8, "train", "c")], x_label="x", y_label="rows")
    root = ElementTree.fromstring(svg)
    assert root.find("rect/title").text == "a <b>"
    first, second = root.findall("rect")
    assert float(second.get("height")) == pytest.approx(2 * float(first.get("height")), abs=0.2)
    assert float(first.get("x")) + float(first.get("width")) <= float(second.get("x"))
    assert bar_chart([], x_label="x", y_label="rows") == ""
