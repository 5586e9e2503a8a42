"""Texts in one array."""

import pytest

from phi3_jax.data.texts import Texts


def test_texts_come_back_one_by_one_and_in_slices():
    given = ["", "the hen", "ä🐔", "half of a character: \ud800", ""]
    texts = Texts.of(given)
    assert list(texts) == given
    assert [texts[-2], texts[1:3], len(texts)] == [given[-2], given[1:3], 5]
    assert Texts.of(texts) is texts
    with pytest.raises(IndexError):
        texts[5]


def test_no_texts_at_all():
    assert list(Texts.of([])) == []
