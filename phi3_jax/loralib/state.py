"""Which arrays of a model train, and which of them are saved and loaded, by loralib's rules."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from phi3_jax.loralib.layers import LoRALayer, LoraParam
from phi3_jax.system.dotted import dotted
from phi3_jax.system.errors import InputError

Bias = Literal["none", "all", "lora_only"]


def mark_only_lora_as_trainable(model: nnx.Module, bias: Bias = "none") -> nnx.State:
    """A bool for every array of `nnx.state(model)`: the mask that `partition` and `freeze` take.

    True at every parameter with `lora_` in its name, and with `bias`
    - `"none"`: nowhere else;
    - `"all"`: at every parameter with `bias` in its name;
    - `"lora_only"`: at the attribute `bias` of each layer of loralib's kinds, also of those with
      `r=0`. The bias of a `Conv2d` is that of its `conv` and not among them, as in loralib.

    Raises `InputError` for another `bias`, and where nothing would train.
    """
    _check(bias)
    parameters = _parameters(model)
    names = {name for name in parameters if "lora_" in name or (bias == "all" and "bias" in name)}
    if bias == "lora_only":
        layers = [path for path, module in nnx.iter_modules(model) if isinstance(module, LoRALayer)]
        names |= {dotted((*path, "bias")) for path in layers} & parameters.keys()
    if not names:
        raise InputError(
            "nothing would train: no parameter is named lora_…; give the model adapters (lora.apply) first"
        )
    marked = []
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        trains = dotted(path) in names
        marked.append((path, jax.tree.map(lambda _, trains=trains: trains, leaf)))
    return nnx.from_flat_state(marked)


def lora_state_dict(model: nnx.Module, bias: Bias = "none") -> dict[str, jax.Array]:
    """The arrays to save, by dotted name: those with `lora_` in their name, and with `bias`
    - `"none"`: no other;
    - `"all"`: every parameter with `bias` in its name;
    - `"lora_only"`: the `bias` beside each `lora_A`.

    Names and layouts are loralib's: `{"encoder.fc.lora_A": [r, in], "encoder.fc.lora_B": [out, r]}`.

    Raises `InputError` for another `bias`.
    """
    return {name: variable[...] for name, variable in _saved(model, bias).items()}


def load_lora_state_dict(model: nnx.Module, state_dict: Mapping[str, ArrayLike], bias: Bias = "none") -> None:
    """Puts saved arrays into the model, in place; what `lora_state_dict` gives for the same `bias`.

    Weights that `eval()` has merged are merged anew.

    Raises `InputError`, before anything is changed, where an array is missing, unknown or of another
    shape, and for another `bias`.
    """
    expected = _saved(model, bias)
    missing = sorted(expected.keys() - state_dict.keys())
    unknown = sorted(state_dict.keys() - expected.keys())
    if missing or unknown:
        what = [
            f"{problem} {', '.join(names)}" for problem, names in (("missing", missing), ("unknown", unknown)) if names
        ]
        raise InputError(f"the state does not fit the model (bias={bias!r}): {'; '.join(what)}")
    for name, variable in expected.items():
        found = np.shape(state_dict[name])
        if found != variable.shape:
            raise InputError(f"{name} has shape {list(found)} in the state and {list(variable.shape)} in the model")
    for name, variable in expected.items():
        variable[...] = jnp.asarray(np.asarray(state_dict[name]), variable.dtype)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, LoRALayer) and module.merged:
            module.deterministic = True


def _saved(model: nnx.Module, bias: Bias) -> dict[str, Any]:
    _check(bias)
    parameters = _parameters(model)
    names = [name for name in parameters if "lora_" in name or (bias == "all" and "bias" in name)]
    if bias == "lora_only":
        beside = dict.fromkeys(name.split("lora_")[0] + "bias" for name in names)
        names += [name for name in beside if name in parameters]
    return {name: parameters[name] for name in names}


def _parameters(model: nnx.Module) -> dict[str, Any]:
    """Dotted name -> variable, of everything that could train."""
    state = nnx.state(model, (nnx.Param, LoraParam))
    return {dotted(path): variable for path, variable in nnx.to_flat_state(state)}


def _check(bias: str) -> None:
    if bias not in get_args(Bias):
        raise InputError(f"bias is {bias!r}; expected one of {', '.join(get_args(Bias))}")
