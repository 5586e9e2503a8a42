"""PEFT's own `LoraConfig`, taken where one of ours is: its `to_dict()` says all of it, so that PEFT is not imported."""

from dataclasses import fields
from typing import Any, Protocol

from phi3_jax.config.foreign import translate
from phi3_jax.config.lora import LoraConfig
from phi3_jax.system.errors import InputError
from phi3_jax.system.text import shown


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
    for notice in notices:
        print(notice)
    known = {field.name for field in fields(LoraConfig)}
    settings = {name: value for name, value in sections["peft"].items() if value is not None}
    if "target_modules" not in settings:  # as in a script's dictionary, see `scripts`
        print("the configuration has no target_modules, and PEFT none for Phi-3: all-linear is taken")
        settings["target_modules"] = "all-linear"
    # What a later PEFT has: where it is off nothing is lost.
    unknown = [name for name, value in settings.items() if name not in known and value not in (False, {}, [])]
    if unknown:
        raise InputError(f"peft has {', '.join(unknown)}, which is not supported; leave it out")
    ours: dict[str, Any] = {name: value for name, value in settings.items() if name in known}
    return LoraConfig(**ours)
