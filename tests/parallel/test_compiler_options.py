"""Options of XLA by device: which a program is compiled with, and what of those that its compiler refuses."""

import jax
import jax.numpy as jnp
import pytest

from phi3_jax.parallel.compiler_options import OPTIONS, CompilerOption, compile_program, compiler_options
from phi3_jax.parallel.hardware import HARDWARE
from phi3_jax.system.errors import InputError

GATHER = "xla_enable_async_all_gather"
V6E = {"platform": "tpu", "kind": "TPU v6 lite"}


def lowered():
    return jax.jit(lambda x: x * 3).lower(jnp.ones(3))


def test_every_row_names_a_kind_that_is_known_and_its_source():
    assert len({(option.name, option.platform, option.kinds) for option in OPTIONS}) == len(OPTIONS)
    for option in OPTIONS:
        assert option.platform in ("gpu", "tpu")
        assert option.source
        assert set(option.kinds) <= HARDWARE.keys()


def test_options_are_those_of_the_devices_and_of_programs_that_have_several():
    assert compiler_options(**V6E, devices=8)[GATHER] is True
    assert GATHER not in compiler_options(**V6E, devices=1)
    assert GATHER not in compiler_options(platform="gpu", kind="NVIDIA L4", devices=8)
    assert compiler_options("none", **V6E, devices=8) == {}


def test_a_mapping_stands_over_the_table_and_null_takes_one_away():
    usual = compiler_options(**V6E, devices=8)
    assert compiler_options({GATHER: None, "xla_other": 3}, **V6E, devices=8) == {
        **{name: value for name, value in usual.items() if name != GATHER},
        "xla_other": 3,
    }


@pytest.mark.parametrize("variable", ["XLA_FLAGS", "LIBTPU_INIT_ARGS"])
def test_what_the_environment_sets_is_left_to_it(variable, monkeypatch):
    monkeypatch.setenv(variable, f"--xla_a=1 --{GATHER}=false")
    options = compiler_options(**V6E, devices=8)
    assert GATHER not in options
    assert options
    assert compiler_options({GATHER: True}, **V6E, devices=8)[GATHER] is True  # said for this run alone


def test_an_option_of_the_table_that_the_compiler_does_not_know_is_left_out_with_a_line(monkeypatch):
    rows = tuple(CompilerOption(f"xla_of_{day}", True, "cpu", "made up") for day in ("monday", "tuesday"))
    monkeypatch.setattr("phi3_jax.parallel.compiler_options.OPTIONS", rows)
    lines = []
    program = compile_program(lowered(), "auto", lines.append)
    assert program(jnp.ones(3)).tolist() == [3, 3, 3]
    assert sorted(lines) == [
        f"compiler option xla_of_{day} is left out: this version's compiler for cpu does not know it"
        for day in ("monday", "tuesday")
    ]


def test_a_value_that_the_compiler_does_not_take_is_the_users_to_mend(monkeypatch):
    bad = {"xla_cpu_enable_fast_math": "maybe"}
    with pytest.raises(InputError, match="xla_cpu_enable_fast_math is 'maybe', which the compiler for cpu does not"):
        compile_program(lowered(), bad)
    rows = (CompilerOption("xla_cpu_enable_fast_math", "maybe", "cpu", "made up"),)
    monkeypatch.setattr("phi3_jax.parallel.compiler_options.OPTIONS", rows)
    lines = []
    compile_program(lowered(), "auto", lines.append)
    assert len(lines) == 1
    assert "does not take 'maybe'" in lines[0]


def test_numbers_are_taken_as_text_is():
    name = "xla_backend_optimization_level"
    with pytest.raises(InputError, match=name):
        compile_program(lowered(), {name: "high"})
    assert compile_program(lowered(), {name: 0})(jnp.ones(3)).tolist() == [3, 3, 3]
