"""A run's evaluations."""

from types import SimpleNamespace

import jax
import pytest

from phi3_jax.parallel.devices import Devices
from phi3_jax.parallel.mesh import make_mesh
from phi3_jax.training.evaluator import Evaluator
from tests.helpers.models import tiny_model
from tests.helpers.runs import run_config

CASES = [({}, "steps", False), ({"eval": ["a"]}, "no", False), ({"eval": ["a"]}, "steps", True)]


@pytest.mark.parametrize(("rows", "strategy", "wanted"), CASES)
def test_it_is_wanted_where_there_are_rows_and_the_run_asks(tmp_path, rows, strategy, wanted):
    steps = {"eval_steps": None} if strategy == "no" else {}
    run = run_config(tmp_path, training={"eval_strategy": strategy, **steps})
    devices = Devices(make_mesh({}, jax.devices()[:1]))
    prompts = [([1, 2], "yes"), ([3], "no")]
    model = tiny_model(1)
    data = SimpleNamespace(eval_sets=rows)
    job = SimpleNamespace(devices=devices, graph=model, dtype=model.dtype, data=data, prompts=prompts)
    evaluator = Evaluator(run, job, signals=None)
    assert evaluator.wanted == wanted
    if not wanted:
        assert evaluator.answers({}) == []
    figures = evaluator.with_answers({"eval_loss": 1.0}, ["yes", "perhaps"])
    assert (figures["eval_loss"], figures["exact_match"]) == (1.0, 0.5)
    assert evaluator.with_answers({"eval_loss": 1.0}, []) == {"eval_loss": 1.0}
