"""What a metric is, by the simplest one."""

import pytest

from phi3_jax.evaluate.metric import Row, Share
from phi3_jax.report.statistics import estimate


def test_a_share_is_the_mean_of_what_is_right():
    metric = Share("longer", lambda answer, reference: len(answer) > len(reference))
    metric.prepare(["b", "bb"])
    assert metric.needs_answers
    rows = [Row(a, r, metric.score(a, r)) for a, r in (("aa", "b"), ("a", "bb"), ("aaa", "b"))]
    assert [row.scores for row in rows] == [{"longer": 1}, {"longer": 0}, {"longer": 1}]
    assert estimate(metric.columns(rows)["longer"]) == pytest.approx(2 / 3)
