"""PEFT's adapter_config.json, both ways."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path

from phi3_jax.config.foreign import table
from phi3_jax.config.lora import LoraConfig
from phi3_jax.system.errors import InputError
from phi3_jax.system.reading import read_json
from phi3_jax.system.text import shown

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
TYING = "ensure_weight_tying"

# The entries that a finished adapter's configuration is read from: how LoftQ began is of no matter any more.
SUPPORTED = {field.name for field in fields(LoraConfig)} - {"loftq_config", TYING}
# Starts that leave the base as it is, so that the tensors are an update of it.
PLAIN_INITIALISERS = (None, True, False, "gaussian", "orthogonal", "eva")


def read_adapter_config(folder: str | Path) -> LoraConfig:
    """Reads `folder/adapter_config.json`.

    Raises:
        InputError: For kinds of adapter other than LoRA, for initialisers that changed the base's weights, and naming
            every entry that asks for something not supported yet; entries nobody here has heard of count as such
            unless they are empty, false or null.
    """
    path = Path(folder) / CONFIG_FILE
    raw = read_json(path, "give a PEFT adapter's folder")
    if raw.get("peft_type") != "LORA":
        raise InputError(
            f"{path}: peft_type is {shown(raw.get('peft_type'))}, expected 'LORA'; no other kind is supported"
        )
    foreign = table().peft
    known = {"peft_type", "loftq_config", TYING, *foreign.bookkeeping, *foreign.beginnings}
    asked = [name for name in sorted(raw) if name not in known and _is_unsupported(name, raw[name])]
    unsupported = [f"{name} {_short(raw[name])}" for name in asked]
    if unsupported:
        raise InputError(f"{path}: not supported yet: {', '.join(unsupported)}; save an adapter without")
    _check_initialiser(path, raw.get("init_lora_weights"))
    if raw.get("target_modules") is None:
        raise InputError(f"{path}: target_modules is not given; name the modules that have adapters")
    for name, wanted in (("base_model_name_or_path", "a folder or a hub id"), ("revision", "a branch, tag or commit")):
        if not isinstance(raw.get(name), str | None):
            raise InputError(f"{path}: {name} is {shown(raw[name])}, expected {wanted}")
    entries = {name: raw[name] for name in SUPPORTED if raw.get(name) is not None}
    entries.pop("bias", None)
    if entries.get("init_lora_weights") != "eva":
        entries.pop("eva_config", None)
    for name, default in (("r", 8), ("lora_alpha", 8)):  # PEFT's, not ours
        entries.setdefault(name, default)
    try:
        return LoraConfig(**entries)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def ties_weights(folder: str | Path) -> bool:
    """Whether adapter_config.json says that what is done to the embedding was done to a head that shares its table,
    and the other way round: each of them then has tensors of its own in the file."""
    return bool(read_json(Path(folder) / CONFIG_FILE).get(TYING))


def _is_unsupported(name: str, value: object) -> bool:
    if name == "bias":  # of the base's layers, of which Phi-3's have none
        return value not in (None, "none", "all", "lora_only")
    if name == "task_type":
        return value not in (None, "CAUSAL_LM")
    return name not in SUPPORTED and bool(value)


def _check_initialiser(path: Path, kind: object) -> None:
    if any(kind is known or (isinstance(known, str) and kind == known) for known in PLAIN_INITIALISERS):
        return
    way = "save it from PEFT with save_pretrained(..., path_initial_model_for_weight_conversion=...)"
    if kind == "loftq":
        way = "merge it into that base in PEFT, and load the result as a model"
    raise InputError(
        f"{path}: init_lora_weights is {_short(kind)}, which changes the base's weights too, so that its tensors are "
        f"no update of the base as it is; {way}"
    )


def config_entries(config: LoraConfig) -> dict[str, object]:
    """The entries that say for PEFT what adapters are.

    Args:
        config: In the form that `described` gives.
    """
    changes_base = config.is_residual or config.init_lora_weights == "loftq"
    return {
        "peft_type": "LORA",
        "task_type": config.task_type,
        "auto_mapping": None,
        "base_model_name_or_path": config.base_model_name_or_path,
        "revision": config.revision,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": _whole(config.lora_alpha),
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "lora_bias": config.lora_bias,
        # The modules themselves, not the expression that found them: vLLM and others read only names.
        "target_modules": list(config.target_modules),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": dict(config.rank_pattern or {}),
        "alpha_pattern": {name: _whole(alpha) for name, alpha in (config.alpha_pattern or {}).items()},
        "modules_to_save": list(config.modules_to_save or ()) or None,
        "trainable_token_indices": _lists(config.trainable_token_indices),
        # PiSSA, OLoRA and LoftQ are written as an update of the untouched base.
        "init_lora_weights": True if changes_base else config.init_lora_weights,
        "eva_config": None if config.eva_config is None else dict(config.eva_config),
        "bias": "none",
        "fan_in_fan_out": False,
    }


def _whole(alpha: float) -> float:
    # PEFT's own numbers are whole ones where they can be.
    return int(alpha) if alpha == int(alpha) else alpha


def _lists(tokens: Mapping[str, Iterable[int]] | Iterable[int] | None) -> object:
    if isinstance(tokens, Mapping):
        return {module: list(ids) for module, ids in tokens.items()}
    return None if tokens is None else list(tokens)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
