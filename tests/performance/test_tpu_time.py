"""How long a step takes on TPUs, by its compiled program or reckoned."""

import pytest

from phi3_jax.config.model import Phi3Config
from phi3_jax.config.run import RunConfig
from phi3_jax.parallel.hardware import HARDWARE
from phi3_jax.performance.cost import StepCost, Work
from phi3_jax.performance.step_time import step_time
from phi3_jax.performance.topology import parse_topology
from phi3_jax.performance.tpu_time import ATTENTION_PER_CYCLE, MARGIN, DeviceWork, compiled_seconds
from tests.helpers.plans import MINI

V5E = HARDWARE["TPU v5 lite"]
ALONE = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}


def run_of(**sections):
    model = {"name_or_path": "x", **sections.pop("model", {})}
    training = {"per_device_train_batch_size": 4, **sections.pop("training", {})}
    data = {"max_length": 2048, **sections.pop("data", {})}
    return RunConfig.from_dict({"model": model, "data": data, "training": training, **sections})


def seconds(run, cost=None, topology="v5e:1x1"):
    found = step_time(run, Phi3Config.from_dict(MINI), ALONE, 25_165_824, parse_topology(topology), cost)
    return found.seconds, found.basis


def test_what_xla_has_no_time_of_is_added_to_its_estimate():
    cost = StepCost({"base products": Work(seconds=1.0)}, waited_bytes=0.1e12)
    work = DeviceWork(tokens=8192, passes=1, products=1e14, attention=1.5e9 * ATTENTION_PER_CYCLE)
    assert compiled_seconds(cost, work, V5E) == pytest.approx(1 + 1 + 0.5)


def test_a_compiled_step_is_told_by_its_program():
    cost = StepCost({"base products": Work(seconds=10.0)})
    (least, most), basis = seconds(run_of(), cost)
    assert 10 < least < 10.5  # and attention
    assert most == pytest.approx(least * (1 + MARGIN))
    assert "compiled program" in basis
    assert "not measured" in basis


def test_attention_counts_what_is_made_again():
    cost = StepCost({})
    full, kept = (seconds(run_of(training={"remat_policy": policy}), cost)[0][0] for policy in ("full", "attention"))
    assert full / kept == pytest.approx(4.5 / 3.5)


def test_a_reckoned_step_grows_with_what_it_moves():
    plain, _ = seconds(run_of())
    dropout, _ = seconds(run_of(peft={"lora_dropout": 0.05}))
    quantised, _ = seconds(run_of(model={"quantization": "nf4"}))
    twice, _ = seconds(run_of(training={"gradient_accumulation_steps": 2}))
    assert plain[0] < dropout[0]
    assert plain[0] < quantised[0]
    assert twice[0] == pytest.approx(2 * plain[0])
    faster, _ = seconds(run_of(), topology="v6e:1x1")
    assert plain[0] / 918 * 197 < faster[0] < plain[0] / 1.5  # slower than by the peaks: what is moved counts
