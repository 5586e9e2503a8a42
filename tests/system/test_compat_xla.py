"""Insides of JAX's programs and XLA's words: red where they change."""

import jax
import jax.numpy as jnp
import pytest

from phi3_jax.system.compat_xla import bytes_needed, is_out_of_memory, scans, stacked_outputs


def test_scans_are_found_in_the_programs_that_equations_hold() -> None:
    def inner(carry, x):
        return carry + x, (carry, x * 2)

    @jax.jit
    def program(xs):
        total, _ = jax.lax.scan(jax.checkpoint(inner), jnp.zeros(3), xs)
        return jax.lax.cond(total[0] > 0, lambda: jax.lax.scan(inner, jnp.zeros(3), xs)[0], lambda: total)

    found = list(scans(jax.make_jaxpr(program)(jnp.ones((5, 3))).jaxpr))
    assert [scan.params["length"] for scan in found] == [5, 5]
    assert [output.shape for output in stacked_outputs(found[0])] == [(5, 3), (5, 3)]


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (29.50G) exceeds "
         "available HBM (15.75G).", 29.5 * 2**30),
        ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: XLA:TPU compile permanent error. Ran out of memory in memory "
         "space hbm. Used 215.17G of 31.25G hbm. Exceeded hbm capacity by 183.92G.", 215.17 * 2**30),
        ("INVALID_ARGUMENT: Used 3.00G of it", None),
    ],
)  # fmt: skip
def test_what_xla_says_it_needs(message: str, needed: float | None) -> None:
    found = bytes_needed(jax.errors.JaxRuntimeError(message))
    assert found == (None if needed is None else round(needed))


def test_xla_says_so_itself_where_memory_runs_out() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.block_until_ready(jnp.zeros((2**46,), jnp.int8))
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(ValueError("RESOURCE_EXHAUSTED"))
