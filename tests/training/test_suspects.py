"""Which rows a loss that is not finite comes from."""

from pathlib import Path

import pytest

from phi3_jax.training.loop import train
from tests.helpers.nonfinite import poison
from tests.helpers.runs import run_config, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Rows of which the fourth has a letter whose embedding is not finite."""
    return poison(write_inputs(tmp_path_factory.mktemp("nonfinite")))


def test_a_loss_of_evaluation_rows_that_is_not_finite_names_them(inputs):
    run = run_config(inputs, "evaluation", data={"eval": str(inputs / "chats.jsonl")})
    with pytest.raises(FloatingPointError, match=r"the evaluation's loss is not finite: the loss of .*, row 4 \("):
        train(run)
