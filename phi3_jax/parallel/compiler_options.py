"""What XLA is told beside the program, by device: the one table, and how a program is compiled by it.

An option stands here for what compiled programs show of it, or for what projects measured that train on such devices;
each says where from. Whatever a user has put into XLA_FLAGS or LIBTPU_INIT_ARGS is the user's, and stays as it is.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax.stages import Compiled, Lowered

from phi3_jax.config.training import CompilerChoice
from phi3_jax.parallel.mesh import device_kind, platform
from phi3_jax.system.compat_xla import refused_option
from phi3_jax.system.errors import InputError
from phi3_jax.system.telling import tell

Value = bool | int | str

# In which the options of a process are given to XLA.
_ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


@dataclass(frozen=True)
class CompilerOption:
    """An option of XLA's, and which programs it is for.

    Attributes:
        name: As XLA has it.
        value: Its value.
        platform: `gpu` or `tpu`.
        source: Who sets it, or which figures speak for it.
        kinds: JAX's `device_kind`s that it is for; all of the platform where there are none.
        on_several: Only for programs of more than one device.
    """

    name: str
    value: Value
    platform: str
    source: str
    kinds: tuple[str, ...] = ()
    on_several: bool = False


_V6E = ("TPU v6 lite", "TPU v6e")
# Of MaxText's five these three change the program: the layers' gathers of weights, 256 a step of Phi-3-mini on v6e 2x4
# that are waited for without them, go on while products are computed, in the same memory. On v5e they do already.
_GATHERS = "MaxText, benchmarks/xla_flags_library.py, CF_FOR_ALL_GATHER; compiled for v6e 2x4"

OPTIONS: tuple[CompilerOption, ...] = (
    CompilerOption("xla_enable_async_all_gather", True, "tpu", _GATHERS, _V6E, on_several=True),
    CompilerOption("xla_tpu_enable_async_collective_fusion", True, "tpu", _GATHERS, _V6E, on_several=True),
    CompilerOption(
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather", True, "tpu", _GATHERS, _V6E, on_several=True
    ),
    CompilerOption(
        "xla_gpu_enable_latency_hiding_scheduler",
        True,
        "gpu",
        "JAX's documentation, GPU performance tips, and MaxText's GPU scripts: what devices send one another goes on "
        "while they compute",
        on_several=True,
    ),
)


def compiler_options(choice: CompilerChoice = "auto", *, platform: str, kind: str, devices: int) -> dict[str, Value]:
    """The options for a program.

    Args:
        choice: `training.compiler_options`.
        platform: `cpu`, `gpu` or `tpu`.
        kind: JAX's `device_kind` of the devices.
        devices: How many of them the program is for.

    Example:
        >>> compiler_options(platform="cpu", kind="cpu", devices=8)
        {}
        >>> compiler_options({"xla_tpu_scoped_vmem_limit_kib": 65536}, platform="tpu", kind="TPU v4", devices=1)
        {'xla_tpu_scoped_vmem_limit_kib': 65536}
    """
    if choice == "none":
        return {}
    set_by_user = {flag.lstrip("-").partition("=")[0] for name in _ENVIRONMENT for flag in _flags(name)}
    found: dict[str, Value | None] = {
        option.name: option.value
        for option in OPTIONS
        if option.platform == platform
        and (not option.kinds or kind in option.kinds)
        and (devices > 1 or not option.on_several)
        and option.name not in set_by_user
    }
    found |= {} if choice == "auto" else choice
    return {name: value for name, value in found.items() if value is not None}


def _flags(name: str) -> list[str]:
    return os.environ.get(name, "").split()


def _word(value: Value) -> str | bool:
    return value if isinstance(value, bool) else str(value)


def compile_program(lowered: Lowered, choice: CompilerChoice = "auto", say: Callable[[str], None] = tell) -> Compiled:
    """Compiles for the mesh in use, with the options of its devices.

    An option that this version's compiler does not know is left out, and `say` told in a line.

    Args:
        lowered: The program.
        choice: `training.compiler_options`.
        say: What is done with such a line.

    Raises:
        InputError: The compiler does not take the value that the user gives to an option.

    Example:
        >>> lowered = jax.jit(lambda x: 2 * x).lower(jax.ShapeDtypeStruct((2,), "float32"))
        >>> program = compile_program(lowered, {"xla_of_tomorrow": True}, say=print)
        compiler option xla_of_tomorrow is left out: this version's compiler for cpu does not know it
    """
    devices = jax.sharding.get_abstract_mesh().size
    options = compiler_options(choice, platform=platform(), kind=device_kind(), devices=devices)
    while True:
        try:
            return lowered.compile(compiler_options={name: _word(value) for name, value in options.items()} or None)
        except jax.errors.JaxRuntimeError as error:
            refused = refused_option(error)
            if refused is None or refused.name not in options:
                raise
            value = options.pop(refused.name)
            why = f"this version's compiler for {platform()} does not know it"
            if refused.is_known:
                if not isinstance(choice, str) and refused.name in choice:
                    raise InputError(
                        f"training.compiler_options: {refused.name} is {value!r}, which the compiler for {platform()} "
                        f"does not take: {refused.reason}; give another value, or null to leave it out"
                    ) from error
                why = f"this version's compiler for {platform()} does not take {value!r}: {refused.reason}"
            say(f"compiler option {refused.name} is left out: {why}")
