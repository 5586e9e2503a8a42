"""`parallel: auto`: axes by the estimate."""

import pytest

from phi3_jax.config.sections import ParallelSection
from phi3_jax.performance.choose import choose_parallel, with_chosen_axes
from phi3_jax.performance.memory import Estimator, Memory
from phi3_jax.performance.topology import parse_topology
from phi3_jax.system.errors import InputError
from tests.helpers.plans import MINI, run_of

GiB = 2**30


class Estimates:
    """As an `Estimator`, of a base and rows of so many GiB."""

    def __init__(self, config, base, rows):
        self.config, self.base, self.rows = config, base, rows

    def __call__(self, run, topology):
        sizes = run.parallel.sizes
        base, rows = self.base / (sizes["fsdp"] * sizes["context"]), self.rows / sizes["context"]
        return Memory(int(base * GiB), 0, 0, int(rows * GiB), 0)


def chosen(topology, base, rows, **sections):
    run, config = run_of(MINI, **sections)
    choice = choose_parallel(run, parse_topology(topology), Estimates(config, base, rows))
    return {axis: size for axis, size in choice.parallel.sizes.items() if size > 1}, choice.why


@pytest.mark.parametrize(
    ("topology", "base", "rows", "axes"),
    [
        ("v5e:2x4", 7, 3, {"data": 8}),
        ("v5e:2x4", 14, 3, {"data": 4, "fsdp": 2}),  # no more devices than it takes share a copy
        ("v5e:2x4", 60, 3, {"fsdp": 8}),
        ("v5e:2x4", 60, 12, {"fsdp": 4, "context": 2}),
        ("v5e:2x4:2", 7, 3, {"data": 16}),
        ("v5e:2x4:2", 60, 12, {"data": 2, "fsdp": 4, "context": 2}),  # never between slices
        ("v5e:1x1", 7, 3, {}),
        # Of a GPU's memory JAX takes three quarters.
        ("gpu:l4:2", 12, 3, {"fsdp": 2}),
    ],
)
def test_what_sends_the_least_of_what_fits(topology, base, rows, axes):
    found, why = chosen(topology, base, rows)
    assert found == axes
    assert "by plan's estimate" in why
    assert "\n" not in why


def test_it_says_what_would_not_have_fitted():
    _, why = chosen("v5e:2x4", 14, 3)
    assert why == (
        "parallel: data 4, fsdp 2: 2 devices share each copy, in 10.0 of 15.8 GiB; with data 8 a device would need "
        "17.0 GiB, by plan's estimate"
    )


def test_where_nothing_fits_the_least_is_taken_and_told():
    axes, why = chosen("v5e:2x2", 100, 100)
    assert axes == {"context": 4}
    assert "which may not fit" in why


def test_axes_that_do_not_divide_the_rows_are_passed_over():
    axes, why = chosen("v5e:2x4", 60, 50, data={"max_length": 4098, "packing": True})
    assert axes == {"fsdp": 4, "context": 2}
    assert "may not fit" in why


def test_a_run_with_axes_of_its_own_stays_as_it_is():
    run, config = run_of(MINI, parallel={"fsdp": 8})
    assert with_chosen_axes(run, parse_topology("v5e:2x4"), Estimator(config)) == (run, [])


def test_auto_is_never_taken_for_one_device():
    with pytest.raises(InputError, match="parallel is auto"):
        _ = ParallelSection(axes="auto").sizes
    with pytest.raises(InputError, match=r"parallel\.fsdp is 8; leave one out"):
        ParallelSection(axes="auto", fsdp=8)


def test_of_a_real_model():
    run, config = run_of(MINI, parallel={"axes": "auto"}, data={"max_length": 2048})
    found, (line,) = with_chosen_axes(run, parse_topology("v5e:2x4"), Estimator(config))
    assert found.parallel == ParallelSection(data=8)
    assert "only gradients of what trains are sent" in line
