"""What to change where a run does not fit."""

import pytest

from phi3_jax.performance.memory import Estimator
from phi3_jax.performance.suggest import alternatives
from phi3_jax.performance.topology import parse_topology
from tests.helpers.plans import MINI, run_of


def test_alternatives_keep_the_batch_and_use_what_is_idle():
    run, config = run_of(MINI, data={"max_length": 4096}, training={"per_device_train_batch_size": 8})
    found = [a.changes for a in alternatives(run, parse_topology("gpu:l4:4"), Estimator(config))]
    for changes in found:
        if "training.per_device_train_batch_size" in changes:
            other = run.changed(changes).training
            assert other.per_device_train_batch_size * other.gradient_accumulation_steps == 8
            break
    else:
        pytest.fail(f"no smaller batch among {found}")


def test_several_changes_together_where_one_is_not_enough():
    run, config = run_of(
        MINI, data={"max_length": 4096}, training={"per_device_train_batch_size": 32, "remat_policy": "none"}
    )
    estimator, topology = Estimator(config), parse_topology("gpu:l4")
    (found,) = alternatives(run, topology, estimator)
    assert len(found.changes) > 2
    assert estimator(run.changed(found.changes), topology).total <= topology.hbm
