"""The keyword arguments of transformers' `from_pretrained`: what each of them means here.

A script's calls are carried over as they stand. What says the same under another name is taken; what steers how PyTorch
loads a model is named in a printed line, with the reason why nothing depends on it here; the rest is refused.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

import jax.numpy as jnp
from jax.typing import DTypeLike

from phi3_jax.config.foreign import translate
from phi3_jax.system.errors import InputError
from phi3_jax.system.text import one_line, shown

_PLACED = "JAX puts the model on its first device, or where `mesh` says"
_NO_OFFLOAD = "weights go from their file straight to the device"
_NO_CODE = "no code out of a checkpoint is ever run"
# What changes nothing that is computed, and why.
PASSED_OVER = {
    "_fast_init": "weights are read and never drawn first",
    "attn_implementation": "`attention` chooses the kernel; all give the same",
    "code_revision": _NO_CODE,
    "device_map": _PLACED,
    "low_cpu_mem_usage": "weights are read one after the other in any case",
    "max_memory": _PLACED,
    "offload_buffers": _NO_OFFLOAD,
    "offload_folder": _NO_OFFLOAD,
    "offload_state_dict": _NO_OFFLOAD,
    "resume_download": "downloads are resumed in any case",
    "trust_remote_code": _NO_CODE,
    "use_cache": "generation keeps keys and values, and training does not",
    "use_flash_attention_2": "`attention` chooses the kernel; all give the same",
    "use_safetensors": "safetensors is all that is read",
}
OF_TOKENIZER = {"trust_remote_code": _NO_CODE, "use_fast": "the tokenizer is the fast one in any case"}
# With these values, as with None, they ask for nothing, with others for what there is not.
OFF: dict[str, Sequence[object]] = {
    "adapter_kwargs": ({},),
    "force_download": (False,),
    "from_flax": (False,),
    "from_tf": (False,),
    "ignore_mismatched_sizes": (False,),
    "key_mapping": ({},),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_loading_info": (False,),
    "proxies": ({},),
    "return_dict": (True,),
    "variant": ("",),
    "weights_only": (True, False),  # of pickles, which are not read
}


T = TypeVar("T")


class TorchDtype(Protocol):
    """A `torch.dtype`, such as `torch.bfloat16`."""

    @property
    def is_floating_point(self) -> bool: ...

    @property
    def itemsize(self) -> int: ...


Dtype = DTypeLike | TorchDtype


class BnbObject(Protocol):
    """What `transformers.BitsAndBytesConfig(…)` makes."""

    @property
    def quant_method(self) -> object: ...

    def to_dict(self) -> dict[str, object]:
        """All settings."""
        ...


@dataclass(frozen=True)
class Kept:
    """In what a model's weights are kept.

    Attributes:
        dtype: Its name, or `auto`.
        quantization: `nf4`, `int8` or None.
        double_quant: Whether the statistics of NF4 are quantised too.
    """

    dtype: str
    quantization: str | None
    double_quant: bool


def pass_over(
    function: str, given: Mapping[str, object], own: Iterable[str], known: Mapping[str, str] = PASSED_OVER
) -> None:
    """Prints a line for each of transformers' arguments that mean nothing here.

    Args:
        function: What was called.
        given: Arguments that it has not itself.
        own: Those that it has, for the message.
        known: Those that change nothing, and why.

    Raises:
        TypeError: Naming all the others.

    Example:
        >>> pass_over("from_pretrained", {"low_cpu_mem_usage": True, "output_attentions": False}, ["dtype"])
        low_cpu_mem_usage=True is passed over: weights are read one after the other in any case
        >>> pass_over("from_pretrained", {"output_attentions": True}, ["dtype"])
        Traceback (most recent call last):
        TypeError: from_pretrained() got output_attentions=True, which means nothing here; leave it out, or give dtype
    """
    asked = {name: value for name, value in given.items() if value is not None}
    refused = [f"{name}={shown(asked[name])}" for name in asked if name not in known and not _is_off(name, asked)]
    if refused:
        raise TypeError(
            one_line(
                f"{function}() got {', '.join(refused)}, which means nothing here; leave it out, or give "
                f"{', '.join(own)}"
            )
        )
    for name in asked:
        if name in known:
            print(one_line(f"{name}={shown(asked[name])} is passed over: {known[name]}"))


def _is_off(name: str, given: Mapping[str, object]) -> bool:
    return any(type(given[name]) is type(off) and given[name] == off for off in OFF.get(name, ()))


def same(first: str, one: T | None, second: str, other: T | None) -> T | None:
    """The value that two names have for one thing. Raises `InputError` where both are given and differ."""
    if one is not None and other is not None and one != other:
        raise InputError(f"{first} is {shown(one)} and {second} {shown(other)}; leave one of them out")
    return other if one is None else one


def named_dtype(dtype: Dtype) -> str:
    """NumPy's, JAX's or PyTorch's type by the name that all three have for it; `auto` stays.

    Raises:
        InputError: For what is no type.

    Example:
        >>> named_dtype(jnp.bfloat16), named_dtype("torch.bfloat16"), named_dtype("auto")
        ('bfloat16', 'bfloat16', 'auto')
    """
    if isinstance(dtype, str) or type(dtype).__module__ == "torch":
        return str(dtype).removeprefix("torch.")
    try:
        return str(jnp.dtype(cast(DTypeLike, dtype)))
    except TypeError as error:
        raise InputError(f"dtype is {shown(dtype)}, expected float32, bfloat16 or float16") from error


def weights_kept(
    dtype: str | None,
    quantization: str | None,
    double_quant: bool | None,
    config: BnbObject | Mapping[str, object] | None,
) -> Kept:
    """What the arguments for the weights' type ask for together.

    Args:
        dtype: As `named_dtype` gives it; None: what `config` computes in, and without one bfloat16.
        quantization: `nf4` or `int8`.
        double_quant: Of NF4; None: as `config` says, and without one true.
        config: A BitsAndBytesConfig, or its dictionary.

    Raises:
        InputError: For what is not supported, and where two of them contradict each other.

    Example:
        >>> weights_kept(None, None, None, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
        Kept(dtype='bfloat16', quantization='nf4', double_quant=False)
    """
    if config is None:
        return Kept(dtype or "bfloat16", quantization, double_quant is not False)
    sections, notices = translate({"model": {"quantization_config": config}})
    model = sections["model"]
    kind = same("quantization", quantization, "quantization_config's", model.get("quantization"))
    double = same("double_quant", double_quant, "quantization_config's", model.get("double_quant"))
    compute = model.get("dtype")
    if dtype is not None and compute is not None and compute != dtype:
        notices.append(f"quantization_config's bnb_4bit_compute_dtype {compute}: all is computed in dtype {dtype}")
    for notice in notices:
        print(one_line(notice))
    return Kept(dtype or str(compute or "bfloat16"), None if kind is None else str(kind), double is not False)
