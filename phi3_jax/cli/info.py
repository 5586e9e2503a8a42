"""`phi3-jax info`: what a checkpoint or an adapter holds, without loading its weights."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phi3_jax.cli.parser import Parser
from phi3_jax.config import Phi3Config
from phi3_jax.errors import InputError

# What config.json says that one wants to know first.
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "sliding_window",
    "tie_word_embeddings",
)


def run(argv: Sequence[str]) -> None:
    parser = Parser("info", "What a checkpoint or an adapter holds; weights are not loaded.")
    parser.add_argument("path", metavar="PATH", help="folder of a checkpoint, an adapter or a run, or a hub id")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--local-files-only", action="store_true", help="never ask the network")
    arguments = parser.parse(argv)
    facts = describe(arguments.path, local_files_only=arguments.local_files_only)
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        print("\n".join(_lines(facts)))


def describe(path: str, *, local_files_only: bool = False) -> dict[str, Any]:
    """Facts about a folder or hub id, as plain values.

    Raises `InputError` where it holds neither model nor adapter, and where the weights that are
    there do not fit the configuration.
    """
    from phi3_jax.hf.hub import TOKENIZER_FILES, resolve_checkpoint

    folder = Path(path).expanduser()
    local = folder.is_dir()
    if not local:  # the small files do: nobody wants gigabytes for this
        folder = resolve_checkpoint(path, local_files_only=local_files_only, patterns=TOKENIZER_FILES)
    facts: dict[str, Any] = {"path": path}
    if (folder / "config.json").is_file():
        facts |= _describe_model(folder, has_weights=local)
    adapters = [
        file.parent
        for file in sorted(folder.glob("adapter_config.json")) + sorted(folder.glob("*/adapter_config.json"))
    ]
    facts["adapters"] = [_describe_adapter(adapter) for adapter in adapters]
    if "config" not in facts and not adapters:
        raise InputError(f"{path}: no config.json and no adapter_config.json in it; give a checkpoint or an adapter")
    return facts


def _describe_model(folder: Path, *, has_weights: bool) -> dict[str, Any]:
    from phi3_jax.hf.checkpoint import checkpoint_slots, read_config

    config = read_config(folder)
    slots = checkpoint_slots(config)
    groups: Counter[str] = Counter()
    for slot in slots:
        groups[".".join(slot.path[:-1])] += math.prod(slot.shape)
    rope = config.rope
    return {
        "model_type": "phi3",
        "config": {name: getattr(config, name) for name in SIZES}
        | {
            "rope": "longrope" if rope.is_longrope else "default",
            "rope_theta": rope.theta,
            "partial_rotary_factor": rope.partial_rotary_factor,
        },
        "parameters": sum(groups.values()),
        "parameters_by_module": dict(groups),
        "weights": _describe_weights(folder, config) if has_weights else None,
        "chat_template": _chat_template(folder),
    }


def _describe_weights(folder: Path, config: Phi3Config) -> dict[str, Any] | None:
    """Files, bytes and types of the weights; None where the folder holds none of them."""
    from phi3_jax.hf.checkpoint import read_weights

    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        return None
    weights = read_weights(folder, config)
    if weights.problems:
        raise InputError(f"{folder}: {'; '.join(weights.problems)}; give the whole checkpoint")
    return {
        "files": [file.name for file in weights.files],
        "bytes": sum(file.stat().st_size for file in weights.files),
        "dtypes": dict(Counter(entry.dtype for entry in weights.tensors.values())),
    }


def _chat_template(folder: Path) -> str | None:
    """The checkpoint's chat template: a file of its own in newer ones, else in tokenizer_config.json."""
    own, shared = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    try:
        if own.is_file():
            return own.read_text(encoding="utf-8")
        template = json.loads(shared.read_text(encoding="utf-8")).get("chat_template") if shared.is_file() else None
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{folder}: its chat template cannot be read ({error}); download it again") from error
    return template if isinstance(template, str | None) else json.dumps(template)


def _describe_adapter(folder: Path) -> dict[str, Any]:
    from phi3_jax.hf.peft import read_adapter_config
    from phi3_jax.hf.safetensors_io import read_header

    config = read_adapter_config(folder)
    file = folder / "adapter_model.safetensors"
    tensors = read_header(file) if file.is_file() else {}
    targets = config.target_modules
    return {
        "path": str(folder),
        "base_model_name_or_path": config.base_model_name_or_path,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "parameters": sum(math.prod(entry.shape) for entry in tensors.values()) if tensors else None,
        "dtypes": dict(Counter(entry.dtype for entry in tensors.values())),
    }


def _lines(facts: Mapping[str, Any]) -> list[str]:
    lines = [facts["path"]]
    if "config" in facts:
        lines += [_line(name, value) for name, value in facts["config"].items()]
        lines.append(_line("parameters", facts["parameters"]))
        lines += [_line(f"  {name}", count) for name, count in facts["parameters_by_module"].items()]
        weights = facts["weights"]
        lines.append(_line("weights", "not here" if weights is None else ", ".join(weights["files"])))
        if weights is not None:
            lines.append(_line("bytes", weights["bytes"]))
            lines.append(_line("dtype", ", ".join(weights["dtypes"])))
        template = facts["chat_template"]
        lines += ["chat template"] + [f"  {line}" for line in (template or "none").splitlines()]
    for adapter in facts["adapters"]:
        lines += [f"adapter {adapter['path']}"]
        lines += [_line(f"  {name}", value) for name, value in adapter.items() if name != "path"]
    return lines


def _line(name: str, value: Any) -> str:
    if isinstance(value, list | dict):
        value = ", ".join(map(str, value))
    elif value is None or isinstance(value, bool):
        value = {None: "none", True: "true", False: "false"}[value]
    elif isinstance(value, int):
        value = f"{value:,}"
    return f"{name:<40}{value}"
