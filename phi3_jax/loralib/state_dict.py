"""Which arrays of a model train, and which of them are saved and loaded, by loralib's rules."""

from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import PyTree

from phi3_jax.loralib.adapted import LoRALayer, LoraParam
from phi3_jax.system.dotted import dotted
from phi3_jax.system.errors import InputError

Bias = Literal["none", "all", "lora_only"]
ArrayVariable: TypeAlias = nnx.Variable[jax.Array]


def mark_only_lora_as_trainable(model: nnx.Module, bias: Bias = "none") -> PyTree[bool]:
    """A bool for every array of `nnx.state(model)`: the mask that `partition` and `freeze` take.

    Args:
        model: With adapters, by `lora.apply` or of loralib's layers.
        bias: Beside every parameter with `lora_` in its name, `"none"`: nothing trains; `"all"`: every
            parameter with `bias` in its name; `"lora_only"`: the attribute `bias` of each layer of loralib's
            kinds, also of those with `r=0`. The bias of a `Conv2d` is that of its `conv` and not among them, as
            in loralib.

    Raises:
        InputError: For another `bias`, and where nothing would train.

    Example:
        >>> import phi3_jax.loralib as lora
        >>> model = lora.Linear(3, 2, r=1, rngs=nnx.Rngs(0))
        >>> mask = lora.mark_only_lora_as_trainable(model)
        >>> {name: bool(variable.get_value()) for (name,), variable in nnx.to_flat_state(mask)}
        {'bias': False, 'kernel': False, 'lora_A': True, 'lora_B': True}
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
    """The arrays to save, by dotted name: those with `lora_` in their name, and what `bias` says.

    Names and layouts are loralib's: `{"encoder.fc.lora_A": [r, in], "encoder.fc.lora_B": [out, r]}`.

    Args:
        model: With adapters.
        bias: `"none"`: no other; `"all"`: every parameter with `bias` in its name; `"lora_only"`: the `bias`
            beside each `lora_A`.

    Raises:
        InputError: For another `bias`.

    Example:
        >>> import phi3_jax.loralib as lora
        >>> model = lora.Linear(3, 2, r=1, rngs=nnx.Rngs(0))
        >>> {name: array.shape for name, array in lora.lora_state_dict(model).items()}
        {'lora_A': (1, 3), 'lora_B': (2, 1)}
    """
    return {name: variable[...] for name, variable in _saved(model, bias).items()}


def load_lora_state_dict(model: nnx.Module, state_dict: Mapping[str, ArrayLike], bias: Bias = "none") -> None:
    """Puts saved arrays into the model, in place; what `lora_state_dict` gives for the same `bias`.

    Weights that `eval()` has merged are merged anew.

    Args:
        model: Of the same layers.
        state_dict: By dotted name the arrays.
        bias: As it was saved with.

    Raises:
        InputError: Before anything is changed, where an array is missing, unknown or of another shape, and for
            another `bias`.

    Example:
        >>> import phi3_jax.loralib as lora
        >>> model = lora.Linear(3, 2, r=1, rngs=nnx.Rngs(0))
        >>> lora.load_lora_state_dict(model, {"lora_A": np.ones((1, 3)), "lora_B": np.zeros((2, 1))})
        >>> model.lora_A[...].tolist()
        [[1.0, 1.0, 1.0]]
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


def _saved(model: nnx.Module, bias: Bias) -> dict[str, ArrayVariable]:
    _check(bias)
    parameters = _parameters(model)
    names = [name for name in parameters if "lora_" in name or (bias == "all" and "bias" in name)]
    if bias == "lora_only":
        beside = dict.fromkeys(name.split("lora_")[0] + "bias" for name in names)
        names += [name for name in beside if name in parameters]
    return {name: parameters[name] for name in names}


def _parameters(model: nnx.Module) -> dict[str, ArrayVariable]:
    """Dotted name -> variable, of everything that could train."""
    state = nnx.state(model, (nnx.Param, LoraParam))
    return {dotted(path): variable for path, variable in nnx.to_flat_state(state)}


def _check(bias: str) -> None:
    if bias not in get_args(Bias):
        raise InputError(f"bias is {bias!r}; expected one of {', '.join(get_args(Bias))}")
