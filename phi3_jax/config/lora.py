"""`LoraConfig`: an adapter's configuration, with PEFT's field names."""

import math
import re
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeGuard, TypeVar

from phi3_jax.system.errors import InputError
from phi3_jax.system.expressions import check_expression, matches
from phi3_jax.system.numbers import is_number, is_whole
from phi3_jax.system.text import shown

# Initialisers that need nothing but a key, and those that are computed from the base's weights.
RANDOM_INITIALISERS = ("gaussian", "orthogonal")
WEIGHT_INITIALISERS = ("pissa", "olora", "loftq")
PISSA = re.compile(r"pissa(?:_niter_([1-9]\d*))?")

LOFTQ_DEFAULTS = {"loftq_bits": 4, "loftq_iter": 1}
EVA_DEFAULTS = {
    "rho": 2.0,
    "tau": 0.99,
    "use_label_mask": True,
    "label_mask_value": -100,
    "whiten": False,
    "adjust_scaling_factors": True,
}


Value = TypeVar("Value")


class FrozenDict(dict[str, Value]):
    """A dictionary that never changes, and so can be hashed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("the entries of a LoraConfig do not change; make another with dataclasses.replace")

    __setitem__ = __delitem__ = update = pop = popitem = clear = setdefault = _refuse


@dataclass(frozen=True)
class LoraConfig:
    """What PEFT's `LoraConfig` calls these things; hashable, so that it can ride in a pytree.

    The fields' texts are the help of `phi3-jax train`, too.

    Attributes:
        r: Rank of the update.
        lora_alpha: The update is scaled by lora_alpha / r.
        lora_dropout: Probability of dropping an adapter's input in training.
        target_modules: all-linear (every linear layer but the output head), a list of module names or .suffixes such
            as [qkv_proj, o_proj] or, for slices of fused layers, [q_proj, v_proj] (also k_proj, gate_proj and
            up_proj), or one regular expression for the whole name.
        exclude_modules: Names, or one expression, left out of target_modules.
        layers_to_transform: Index or indices of the layers that get adapters; null for all.
        layers_pattern: Name of the list of layers; layers.
        rank_pattern: Other ranks by module, for example {down_proj: 32}: each key is a regular expression for the end
            of a name, and the first that matches counts.
        alpha_pattern: Other lora_alpha by module.
        use_rslora: Scale by lora_alpha / sqrt(r) instead.
        use_dora: DoRA; magnitude and direction of each weight's rows apart.
        lora_bias: Give B a bias.
        init_lora_weights: true (Kaiming-uniform A, zero B), gaussian (A ~ N(0, 1/r), zero B), orthogonal, pissa,
            pissa_niter_16, olora, eva or loftq; false makes both random, for tests.
        loftq_config: Settings of loftq, {loftq_bits, loftq_iter}.
        eva_config: Settings of eva, {rho, tau, use_label_mask, label_mask_value, whiten, adjust_scaling_factors}.
        modules_to_save: Modules that train as a whole beside the adapters, for example [lm_head].
        trainable_token_indices: Ids of tokens whose embeddings train, or such lists by module.
        bias: none, all or lora_only, which of the base's biases train too: Phi-3 has none, so that all three are the
            same.
        ensure_weight_tying: Give embedding and output head one adapter where they share a table; refused where that
            would change anything, and without meaning elsewhere.
        task_type: Phi-3 is a causal language model; CAUSAL_LM.
        base_model_name_or_path: Base that the saved adapter names; that of the run where it is null.
        revision: Revision of that base, for the saved adapter to name; that of the run where it is null.

    Raises:
        InputError: A value is impossible, or two contradict each other.

    Example:
        >>> from phi3_jax import LoraConfig
        >>> config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 4})
        >>> config.scaling
        2.0
        >>> config.rank_and_alpha("model.layers.0.self_attn.v_proj")
        (4, 16)
        >>> LoraConfig(r=0)
        Traceback (most recent call last):
        phi3_jax.system.errors.InputError: peft.r is 0, expected a whole number of at least 1
    """

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | str = "all-linear"
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: tuple[str, ...] | str | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    loftq_config: dict[str, int] | None = None
    eva_config: dict[str, Any] | None = None
    modules_to_save: tuple[str, ...] | None = None
    trainable_token_indices: tuple[int, ...] | dict[str, Any] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    ensure_weight_tying: bool = False
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        # YAML and PEFT give lists and dictionaries; a pytree's static part must be hashable.
        for name, value in vars(self).items():
            nothing = isinstance(value, Sized) and len(value) == 0 and name != "target_modules"
            object.__setattr__(self, name, None if nothing else _hashable(value))
        self._check_numbers()
        self._check_names()
        self._check_initialiser()
        if self.bias not in ("none", "all", "lora_only"):
            raise InputError(f"peft.bias is {self.bias!r}, expected 'none', 'all' or 'lora_only'")
        if self.task_type != "CAUSAL_LM":
            raise InputError(f"peft.task_type is {self.task_type!r}, expected 'CAUSAL_LM'")
        if self.lora_bias and self.use_dora:
            raise InputError("peft.lora_bias and peft.use_dora are both true, which PEFT has not; switch one off")

    def _check_numbers(self) -> None:
        if not _is_rank(self.r):
            raise InputError(f"peft.r is {self.r!r}, expected a whole number of at least 1")
        if not _is_finite(self.lora_alpha):
            raise InputError(f"peft.lora_alpha is {self.lora_alpha!r}, expected a number")
        if not _is_finite(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise InputError(f"peft.lora_dropout is {self.lora_dropout!r}, expected 0 <= p < 1")
        for name in ("use_rslora", "use_dora", "lora_bias", "ensure_weight_tying"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"peft.{name} is {getattr(self, name)!r}, expected true or false")
        for name, fits, wanted in (
            ("rank_pattern", _is_rank, "a whole number of at least 1"),
            ("alpha_pattern", _is_finite, "a number"),
        ):
            pattern = getattr(self, name)
            if not isinstance(pattern, Mapping | None):
                raise InputError(f"peft.{name} is {pattern!r}, expected {{name: {wanted}}}")
            for key, value in (pattern or {}).items():
                if not isinstance(key, str):
                    raise InputError(f"peft.{name} has {key!r}, expected names of modules")
                if not fits(value):
                    raise InputError(f"peft.{name} gives {key} {value!r}, expected {wanted}")
                for expression in (key, _end_of_name(key)):
                    check_expression(f"peft.{name}", expression)

    def _check_names(self) -> None:
        targets = self.target_modules
        if not _are_names(targets):
            raise InputError(f"peft.target_modules is {targets!r}, expected names, an expression or 'all-linear'")
        if not targets:
            raise InputError("peft.target_modules is empty; name layers, or give 'all-linear'")
        if self.exclude_modules is not None and not _are_names(self.exclude_modules):
            raise InputError(f"peft.exclude_modules is {self.exclude_modules!r}, expected names or an expression")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), str):
                check_expression(f"peft.{name}", getattr(self, name))
        saved = self.modules_to_save
        if saved is not None and not (isinstance(saved, tuple) and _are_names(saved)):
            raise InputError(f"peft.modules_to_save is {saved!r}, expected a list of names")
        layers = self.layers_to_transform
        if isinstance(layers, int):
            layers = (layers,)
        if layers is not None and not (isinstance(layers, tuple) and all(_is_index(layer) for layer in layers)):
            raise InputError(f"peft.layers_to_transform is {self.layers_to_transform!r}, expected layers' indices")
        if layers and isinstance(targets, str) and targets.lower() != "all-linear":
            raise InputError(
                "peft.layers_to_transform is given with an expression for target_modules, which says the layers "
                "itself; give a list of names, or leave it out"
            )
        pattern = self.layers_pattern
        if pattern and not layers:
            raise InputError("peft.layers_pattern is given without layers_to_transform; leave it out")
        if pattern and pattern not in ("layers", ("layers",)):
            raise InputError(f"peft.layers_pattern is {pattern!r}; Phi-3's list of layers is called 'layers'")
        self._check_tokens()

    def _check_tokens(self) -> None:
        tokens = self.trainable_token_indices
        by_module = tokens if isinstance(tokens, Mapping) else {"embed_tokens": tokens or ()}
        for module, indices in by_module.items():
            if not isinstance(indices, tuple) or not all(_is_index(index) for index in indices):
                raise InputError(f"peft.trainable_token_indices is {indices!r} for {module}, expected token ids")
            if len(set(indices)) != len(indices):
                raise InputError(f"peft.trainable_token_indices names a token twice for {module}; name each once")
            if indices and module in (self.modules_to_save or ()):
                raise InputError(
                    f"peft.trainable_token_indices trains rows of {module}, which modules_to_save trains as a whole; "
                    "leave one out"
                )

    def _check_initialiser(self) -> None:
        kind = self.init_lora_weights
        known = isinstance(kind, bool) or kind in (*RANDOM_INITIALISERS, *WEIGHT_INITIALISERS, "eva")
        if not known and not (isinstance(kind, str) and PISSA.fullmatch(kind)):
            raise InputError(
                f"peft.init_lora_weights is {kind!r}, expected true, false, "
                f"{', '.join((*RANDOM_INITIALISERS, *WEIGHT_INITIALISERS, 'pissa_niter_N'))} or eva"
            )
        if kind == "orthogonal" and any(rank % 2 for rank in (self.r, *(self.rank_pattern or {}).values())):
            raise InputError("peft.init_lora_weights is orthogonal, which needs an even r; give one")
        if self.lora_bias and not isinstance(kind, bool):
            raise InputError(f"peft.lora_bias is true with init_lora_weights {kind}, which PEFT has not; leave one out")
        if self.use_dora and (kind == "loftq" or self.is_residual):
            raise InputError(f"peft.use_dora is true with init_lora_weights {kind}: not supported; leave one out")
        for name, belongs, defaults in (
            ("loftq_config", "loftq", LOFTQ_DEFAULTS),
            ("eva_config", "eva", EVA_DEFAULTS),
        ):
            value = getattr(self, name)
            if not value:
                continue
            if kind != belongs:
                raise InputError(
                    f"peft.{name} is given, but init_lora_weights is {kind}; give {belongs}, or leave it out"
                )
            if not isinstance(value, Mapping):
                raise InputError(f"peft.{name} is {shown(value)}, expected a mapping of {', '.join(defaults)}")
            unknown = [str(key) for key in value if key not in defaults]
            if unknown:
                raise InputError(f"peft.{name} has {', '.join(unknown)}; expected {', '.join(defaults)}")

    @property
    def is_residual(self) -> bool:
        """Whether the initial update is taken out of the base, as with PiSSA and OLoRA."""
        kind = self.init_lora_weights
        return isinstance(kind, str) and (kind == "olora" or PISSA.fullmatch(kind) is not None)

    @property
    def scaling(self) -> float:
        """α/r, or α/√r with rsLoRA."""
        return self.scaling_of(self.r, self.lora_alpha)

    def scaling_of(self, r: int, alpha: float) -> float:
        """The scale of a module whose rank and α a pattern sets."""
        return alpha / (math.sqrt(r) if self.use_rslora else r)

    def rank_and_alpha(self, name: str) -> tuple[int, float]:
        """r and α of the module that checkpoints call `name`, as PEFT matches its patterns."""
        return (
            _look_up(self.rank_pattern, name, self.r),
            _look_up(self.alpha_pattern, name, self.lora_alpha),
        )


def matching_key(pattern: Mapping[str, object] | None, name: str) -> str | None:
    """The first key of a rank or α pattern that is the end of `name`, as a regular expression."""
    return next((key for key in pattern or {} if matches("the pattern", _end_of_name(key), name)), None)


def _end_of_name(key: str) -> str:
    return rf"(.*\.)?({key})"


def _look_up(pattern: Mapping[str, Value] | None, name: str, default: Value) -> Value:
    key = matching_key(pattern, name)
    return default if pattern is None or key is None else pattern[key]


def _hashable(value: object) -> object:
    if isinstance(value, set | frozenset):
        return tuple(sorted(value))
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, Mapping):
        return FrozenDict({key: _hashable(entry) for key, entry in value.items()})
    return value


def _are_names(value: object) -> bool:
    return isinstance(value, str | tuple) and all(isinstance(name, str) and name for name in value)


def _is_index(value: object) -> TypeGuard[int]:
    return is_whole(value) and value >= 0


def _is_rank(value: object) -> bool:
    return _is_index(value) and value >= 1


def _is_finite(value: object) -> bool:
    return is_number(value) and abs(value) < 1e300
