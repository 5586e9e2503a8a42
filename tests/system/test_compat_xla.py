"""Insides of JAX's programs and XLA's words: red where they change."""

import jax
import jax.numpy as jnp
import pytest

from phi3_jax.system.compat_xla import (
    RefusedOption,
    bytes_needed,
    has_no_backend,
    is_cudnn_attention,
    is_not_a_slice,
    is_out_of_memory,
    refused_option,
    scans,
    stacked_outputs,
)


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


def test_slices_and_what_quantised_weights_become_are_known_by_their_primitives() -> None:
    def layer(stack, index, x):
        weight = jax.lax.squeeze(jax.lax.dynamic_slice_in_dim(stack, index, 1), (0,))
        return jnp.sin(x @ jax.lax.optimization_barrier(weight))

    jaxpr = jax.make_jaxpr(layer)(jnp.ones((2, 3, 3)), 0, jnp.ones((4, 3))).jaxpr
    kept = {equation.primitive.name for equation in jaxpr.eqns if is_not_a_slice(equation.primitive)}
    assert {"dot_general", "sin"} <= kept
    assert not kept & {"dynamic_slice", "squeeze", "optimization_barrier"}
    assert any(equation.primitive.name == "dynamic_slice" for equation in jaxpr.eqns)


def test_cudnns_attention_is_known_by_its_primitive() -> None:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
    from jax.extend.core import Primitive

    names = {value.name: value for value in vars(cudnn).values() if isinstance(value, Primitive)}
    assert [name for name, primitive in names.items() if is_cudnn_attention(primitive)] == [
        "dot_product_attention_fwd_wrapper"
    ]


def test_devices_that_jax_has_not_are_told_from_other_errors():
    with pytest.raises(RuntimeError) as caught:
        jax.devices("nope")
    assert has_no_backend(caught.value)
    other = RuntimeError(str(caught.value))
    assert not has_no_backend(other)


@pytest.mark.parametrize(
    ("options", "name", "reason"),
    [({"xla_of_tomorrow": True}, "xla_of_tomorrow", ""),
     ({"xla_cpu_enable_fast_math": "maybe"}, "xla_cpu_enable_fast_math", "'maybe' is not a valid bool value")],
)  # fmt: skip
def test_xla_says_itself_which_option_it_refuses(options: dict[str, bool | str], name: str, reason: str) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.jit(lambda x: x + 1).lower(1.0).compile(compiler_options=options)
    assert refused_option(caught.value) == RefusedOption(name, reason)


def test_a_plug_in_says_it_in_its_own_words() -> None:
    message = "INVALID_ARGUMENT: Failed to parse '1' into flag xla_enable_async_all_gather: No such: 1."
    refused = refused_option(jax.errors.JaxRuntimeError(message))
    assert refused == RefusedOption("xla_enable_async_all_gather", "No such: 1")
    assert refused_option(jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes")) is None
    assert refused_option(ValueError("No such compile option: 'xla_of_tomorrow'")) is None
