"""What a compiled step costs, by kind of work."""

import dataclasses
import json

import pytest

from phi3_jax.parallel.hardware import HARDWARE, GiB, Hardware
from phi3_jax.performance.cost import StepCost, Work, seconds_waited, step_cost
from phi3_jax.performance.hlo import Program
from tests.helpers.programs import STEP


@pytest.fixture(scope="module")
def cost():
    return step_cost(Program.of(STEP), Hardware(1e14, 1e12, GiB, "made up", clock=1e9))


def test_work_is_sorted_by_kind_and_summed_over_loops(cost):
    seconds = {kind: work.seconds for kind, work in cost.work.items()}
    assert seconds == pytest.approx(
        {
            "base products": 32 * 3e-3,
            "adapters": 32 * 1e-3,
            "RoPE and layout": 32 * 5e-4,
            "dequantising": 32 * 7e-4,
            "dropout": 32 * 1e-4,
            "attention": 0,  # a kernel, of which XLA says nothing
            "loss": 2e-3,
            "optimizer": 1e-4,
            "others": 1e-3 + 8 * 1e-5 + 4e-4 + 32 * 2e-4,
            "collectives": 0,
        }
    )
    assert cost.seconds == pytest.approx(sum(seconds.values()))


def test_what_is_sent_and_what_is_waited_for(cost):
    assert cost.sent == {"all-gather": 64, "collective-permute": 32}
    assert cost.waited_for == {"all-gather": 32}  # the other one is begun and ended apart
    assert cost.waited_bytes == 32 * 16384 * 3072 * 2
    assert seconds_waited(cost, HARDWARE["TPU v6 lite"]) == pytest.approx(cost.waited_bytes / 0.4e12)
    assert seconds_waited(cost, HARDWARE["NVIDIA L4"]) == 0


def test_a_kernel_that_multiplies_is_counted_by_its_shapes(cost):
    assert cost.kernel_flops["product_kernel"] == 32 * 2 * 8192 * 9216 * 3072


def test_at_least_it_takes_its_products_at_the_peak_or_its_bytes_at_the_bandwidth(cost):
    product = 2 * 4 * 2048 * 3072 * 16384 / 1e14  # longer than to read and write its arrays
    assert cost.work["base products"].bound == pytest.approx(32 * product)
    copied = 4 * 2048 * 3072 * 2 + 4 * 2048 * 32 * 96 * 2
    assert cost.work["RoPE and layout"].bound == pytest.approx(32 * copied / 1e12)
    assert cost.work["collectives"].bound == 0


def test_it_goes_through_json(cost):
    assert StepCost.from_dict(json.loads(json.dumps(dataclasses.asdict(cost)))) == cost


def test_work_adds_up():
    assert Work(1.0, 0.5, 2.0, 3.0, 4) + Work(1.0, 0.5, 1.0, 1.0, 1) == Work(2.0, 1.0, 3.0, 4.0, 5)
