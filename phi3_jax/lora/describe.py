"""A `LoraConfig` that says of every module by name what its adapter is: no expression, no exception."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TypeVar

from phi3_jax.config.lora import LoraConfig
from phi3_jax.system.dotted import last_part

RankAndAlpha = tuple[int, float]
Number = TypeVar("Number", int, float)


def described(
    config: LoraConfig, modules: Mapping[str, RankAndAlpha], num_layers: int, saved: Iterable[str] = ()
) -> LoraConfig:
    """The configuration in the one form that any other for the same adapters comes to.

    As PEFT puts the modules found in place of the expression that found them, so that an adapter is the
    same pytree before it is saved and after it is loaded. `r` and `lora_alpha` are those that most
    modules have (of several, the configuration's own), and the patterns name the others: by the last
    part of the name where all layers of a module agree, in full elsewhere, so that no key matches the
    name of another module and their order does not matter. `exclude_modules` and `layers_to_transform`
    are spent.

    Args:
        config: Any that describes the same adapters.
        modules: (r, α) of each module with an adapter, by the name that checkpoints have for it.
        num_layers: Of the model.
        saved: Names of the modules that train as a whole, the layer index left out.
    """
    r = _most_common([r for r, _ in modules.values()], config.r)
    alpha = _most_common([alpha for _, alpha in modules.values()], config.lora_alpha)
    entries = {entry.name: getattr(config, entry.name) for entry in fields(LoraConfig)}
    entries |= {
        "r": r,
        "lora_alpha": alpha,
        "target_modules": _targets(modules, num_layers),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": _pattern({name: rank for name, (rank, _) in modules.items()}, r),
        "alpha_pattern": _pattern({name: a for name, (_, a) in modules.items()}, alpha),
        "modules_to_save": tuple(sorted(map(_saved_name, saved))),
        # Neither changes anything where it is taken.
        "bias": "none",
        "ensure_weight_tying": False,
    }
    return LoraConfig(**entries)


def alpha_of(config: LoraConfig, scaling: float, r: int) -> float:
    """The α that gives this scale at this rank, without the last digits that rounding left."""
    exact = scaling * (math.sqrt(r) if config.use_rslora else r)
    short = float(f"{exact:.12g}")
    return short if math.isclose(short, exact, rel_tol=1e-14) else exact


def _most_common(values: list[Number], preferred: Number) -> Number:
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value == preferred, value), default=preferred)


def _targets(modules: Iterable[str], num_layers: int) -> tuple[str, ...]:
    names = list(modules)
    counts = Counter(map(last_part, names))
    whole = {part for part, count in counts.items() if count == num_layers}
    return tuple(
        sorted({last_part(name) if last_part(name) in whole or not _in_layers(name) else name for name in names})
    )


def _pattern(values: Mapping[str, Number], default: Number) -> dict[str, Number]:
    by_suffix: dict[str, set[Number]] = {}
    for name, value in values.items():
        by_suffix.setdefault(last_part(name), set()).add(value)
    short = {part for part, found in by_suffix.items() if len(found) == 1}
    pattern = {last_part(n) if last_part(n) in short else n: v for n, v in values.items() if v != default}
    return dict(sorted(pattern.items()))


def _saved_name(name: str) -> str:
    # PEFT takes every module whose name ends so: "norm" would be input_layernorm too.
    return name if name == "model.norm" else name.removeprefix("model.layers.").removeprefix("model.")


def _in_layers(name: str) -> bool:
    return name.startswith("model.layers.")
