"""PEFT's own `LoraConfig`, taken where one of ours is: its `to_dict()` says all of it, so that PEFT is not imported."""

from dataclasses import fields
from typing import Any, Protocol

from phi3_jax.config.foreign import translate
from phi3_jax.config.lora import LoraConfig
from phi3_jax.system.errors import InputError
from phi3_jax.system.text import shown

# Modules of Llama that are slices of Phi-3's, where PEFT finds nothing.
SLICES = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def with_targets(peft: dict[str, object]) -> list[str]:
    """Gives a configuration of PEFT's the targets that it leaves open; lines about what differs from PEFT.

    Example:
        >>> settings = {"r": 8}
        >>> with_targets(settings)
        ['peft_config has no target_modules, and PEFT none for Phi-3: all-linear is taken']
        >>> settings["target_modules"]
        'all-linear'
    """
    targets = peft.get("target_modules")
    if not targets:
        peft["target_modules"] = "all-linear"
        if peft.get("init_from"):  # whose adapter knows its own
            return []
        return ["peft_config has no target_modules, and PEFT none for Phi-3: all-linear is taken"]
    named = targets if isinstance(targets, list | tuple | set | frozenset) else ()
    if slices := [name for name in SLICES if name in named]:
        return [
            f"peft_config.target_modules has {', '.join(slices)}: slices of qkv_proj and gate_up_proj, which get "
            "adapters here; PEFT, which knows the whole layers alone, gives them none"
        ]
    return []


class PeftConfig(Protocol):
    """What `peft.LoraConfig(…)` makes."""

    @property
    def peft_type(self) -> object: ...

    @property
    def target_modules(self) -> object: ...

    def to_dict(self) -> dict[str, Any]:
        """All settings, those that were not given as PEFT has them by default."""
        ...


def as_lora_config(config: LoraConfig | PeftConfig) -> LoraConfig:
    """The configuration itself, or what PEFT's means here: what it leaves open is as PEFT has it by default.

    Raises:
        InputError: For another kind of adapter than LoRA, and by name for settings that are not supported.
    """
    if isinstance(config, LoraConfig):
        return config
    if not hasattr(config, "peft_type") or not hasattr(config, "to_dict"):
        raise InputError(f"the adapter's configuration is {shown(config)}, expected phi3_jax's or PEFT's LoraConfig")
    sections, notices = translate({"peft": config.to_dict()})
    known = {field.name for field in fields(LoraConfig)}
    settings = {name: value for name, value in sections["peft"].items() if value is not None}
    for notice in (*notices, *with_targets(settings)):
        print(notice)
    # What a later PEFT has: where it is off nothing is lost.
    unknown = [name for name, value in settings.items() if name not in known and value not in (False, {}, [])]
    if unknown:
        raise InputError(f"peft has {', '.join(unknown)}, which is not supported; leave it out")
    ours: dict[str, Any] = {name: value for name, value in settings.items() if name in known}
    return LoraConfig(**ours)
