"""Values of Python's, NumPy's and PyTorch's own kinds, as YAML holds them."""

from enum import Enum
from pathlib import Path

import numpy as np
import pytest

from phi3_jax.config.plain import plain, typed


class Strategy(Enum):
    NO = "no"


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        (Strategy.NO, "no"),
        (Path("rows.jsonl"), "rows.jsonl"),
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.array(["o_proj"]), ["o_proj"]),
        (frozenset({"b", "a"}), ["a", "b"]),
        ({"a": Path("a.jsonl")}, {"a": "a.jsonl"}),
        ((np.int64(1), None), (1, None)),
        ("text", "text"),
    ],
)
def test_a_value_is_what_yaml_would_hold(value, meant):
    found = plain(value)
    assert found == meant
    assert type(found) is type(meant)


def test_types_of_torch_are_their_names():
    torch = pytest.importorskip("torch")
    assert plain(torch.bfloat16) == "bfloat16"
    assert plain(torch.tensor(0.5)) == 0.5


def test_text_means_what_yaml_or_a_number_says():
    said = ("no", "null", "1e-4", "2.5E+3", "0.5", "text", "{a: 1}", "x: [")
    assert [typed(text) for text in said] == [False, None, 1e-4, 2500, 0.5, "text", {"a": 1}, "x: ["]
    assert typed(3) == 3
