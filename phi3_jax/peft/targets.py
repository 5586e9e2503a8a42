"""Which modules the adapters of a PEFT file belong to."""

from collections.abc import Iterable
from dataclasses import replace

from phi3_jax.config.lora import LoraConfig
from phi3_jax.lora.targets import Module, adaptable_modules, match_targets, saved_modules
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.system.dotted import last_part
from phi3_jax.system.errors import InputError
from phi3_jax.system.expressions import matches

ENDS = ("embed_tokens", "lm_head")


def peft_modules(model: Phi3ForCausalLM, config: LoraConfig) -> list[Module]:
    """The modules, and the layers of each, that PEFT gives adapters by a configuration.

    As `config_targets`, but that PEFT knows no slices of fused layers, and that what matches nothing in
    `exclude_modules` and the patterns is no error: the tensors in the file tell what there is.

    Raises:
        InputError: Where `target_modules` or `modules_to_save` names something that is not there.
    """
    # Lists made for Llama-like models work in PEFT, too, for those modules that Phi-3 has.
    modules = [module for module in match_targets(model, config.target_modules) if not module.is_slice]
    if not modules:
        raise InputError(
            f"target_modules {config.target_modules} are parts of fused layers, for which PEFT has no adapters; "
            f"expected some of {', '.join(module.suffix for module in adaptable_modules(model))}"
        )
    saved = saved_modules(model, config.modules_to_save or ())
    chosen = [_chosen(module, config) for module in modules if module.name not in saved]
    return [module for module in chosen if module is not None]


def with_both_ends(config: LoraConfig) -> LoraConfig:
    """The configuration of an adapter whose embedding and output head, sharing one table, were adapted alike.

    Example:
        >>> with_both_ends(LoraConfig(target_modules=("qkv_proj", "lm_head"))).target_modules
        ('qkv_proj', 'lm_head', 'embed_tokens')
        >>> with_both_ends(LoraConfig(target_modules=("qkv_proj",))).target_modules
        ('qkv_proj',)
    """
    targets, saved = config.target_modules, config.modules_to_save or ()
    if not isinstance(targets, str):
        targets = _both(targets)
    return replace(config, target_modules=targets, modules_to_save=_both(saved) or None)


def _both(names: Iterable[str]) -> tuple[str, ...]:
    found = tuple(names)
    ends = [end for end in ENDS if any(last_part(name) == end for name in found)]
    return (*found, *(end for end in ENDS if ends and end not in ends))


def _chosen(module: Module, config: LoraConfig) -> Module | None:
    """The module in the layers that exclude_modules and layers_to_transform leave."""
    if not module.layers:
        return module if _is_chosen(module.name, None, config) else None
    named = zip(module.names, module.layers, strict=True)
    return module.narrowed({name for name, layer in named if _is_chosen(name, layer, config)})


def _is_chosen(name: str, layer: int | None, config: LoraConfig) -> bool:
    exclude = config.exclude_modules or ()
    if isinstance(exclude, str):
        if matches("peft.exclude_modules", exclude, name):
            return False
    elif any(_ends(name, excluded) for excluded in exclude):
        return False
    wanted = config.layers_to_transform
    # A name given in full counts whatever its layer.
    if wanted is None or (not isinstance(config.target_modules, str) and name in config.target_modules):
        return True
    return layer == wanted if isinstance(wanted, int) else layer in wanted


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
