"""What a folder holds, without loading it: `phi3-jax info`."""

import collections
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from phi3_jax.config.hub_options import Hub
from phi3_jax.config.model import Phi3Config
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.hf.files import CONFIG
from phi3_jax.hf.hub import SMALL_FILES
from phi3_jax.hf.layout import checkpoint_layout
from phi3_jax.hf.safetensors_io import READABLE, TensorEntry, read_header
from phi3_jax.hf.tokenizer import has_tokenizer, tokenizer_config
from phi3_jax.system.errors import InputError
from phi3_jax.system.reading import read_json, read_text
from phi3_jax.system.text import one_line, printable

CONFIG_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "sliding_window",
    "tie_word_embeddings",
)
ADAPTER_KEYS = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules")
# Shown where something is in them.
ADAPTER_EXTRAS = ("rank_pattern", "alpha_pattern", "lora_bias", "modules_to_save", "trainable_token_indices")
DTYPE_NAMES = {name: dtype.name for name, dtype in READABLE.items()}


def checkpoint_info(
    path_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> dict[str, Any]:
    """What can be said of a checkpoint, an adapter, or a run's output folder; fit for JSON.

    Of a hub repository only the small files are downloaded, so that its weights count as absent unless they
    are cached.

    Args:
        path_or_hub_id: Folder, or hub id.
        revision: Branch, tag or commit on the hub.
        token: To log in to the hub with.
        cache_dir: Where downloads are kept.
        local_files_only: Never ask the network.

    Returns:
        `path`; `config`, `quantization`, `parameters` (their number), `parameters_by_module`, `weights` (`files`,
        `bytes`, tensors by `dtypes`), `tokenizer` and `chat_template`, each None where there is none; and
        `adapters`, a list of those in the folder and in its subfolders.

    Raises:
        InputError: Where there is neither a config.json nor an adapter, and where the weights that are there
            cannot be loaded.

    Example:
        >>> from phi3_jax.demo import demo_path
        >>> info = checkpoint_info(demo_path("base"))
        >>> info["weights"]["files"], info["adapters"], info["tokenizer"]["eos_token"]
        (1, [], '<|endoftext|>')
    """
    hub = Hub(revision, token, cache_dir, local_files_only)
    checkpoint = Checkpoint.open(path_or_hub_id, hub, patterns=SMALL_FILES)
    folder = checkpoint.folder
    adapters = [_adapter(file.parent) for file in _adapter_configs(folder)]
    info: dict[str, Any] = {
        "path": str(path_or_hub_id),
        **dict.fromkeys(("config", "quantization", "parameters", "parameters_by_module", "weights")),
    }
    if (folder / CONFIG).exists():
        counts = _parameters(checkpoint.config)
        info |= {
            "config": _config(checkpoint.config),
            "quantization": None if checkpoint.quantization is None else str(checkpoint.quantization),
            "parameters": sum(counts.values()),
            "parameters_by_module": counts,
            "weights": _weights(checkpoint),
        }
    elif not adapters:
        raise InputError(f"{path_or_hub_id}: no config.json and no adapter in it; give a checkpoint or adapter folder")
    return {**info, "tokenizer": _tokenizer(checkpoint), "chat_template": _chat_template(folder), "adapters": adapters}


def _adapter_configs(folder: Path) -> list[Path]:
    name = "adapter_config.json"
    return [*folder.glob(name), *sorted(folder.glob(f"*/{name}"))]


def _config(config: Phi3Config) -> dict[str, object]:
    rope = config.rope
    return {
        **{key: getattr(config, key) for key in CONFIG_KEYS},
        "rope": "longrope" if rope.is_longrope else "default",
        "rope_theta": rope.theta,
        "rotary_dim": config.rotary_dim,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
    }


def _parameters(config: Phi3Config) -> dict[str, int]:
    counts: collections.Counter[str] = collections.Counter()
    for entry in checkpoint_layout(config):
        counts[".".join(entry.path).removesuffix(".weight")] += math.prod(entry.shape)
    return dict(counts)


def _weights(checkpoint: Checkpoint) -> dict[str, object] | None:
    if not checkpoint.has_weights:
        return None
    return {
        "files": len(checkpoint.weights.files),
        "bytes": sum(file.stat().st_size for file in checkpoint.weights.files),
        "dtypes": _dtypes(checkpoint.weights.tensors.values()),
    }


def _dtypes(tensors: Iterable[TensorEntry]) -> dict[str, int]:
    return dict(collections.Counter(DTYPE_NAMES.get(entry.dtype, entry.dtype) for entry in tensors))


def _tokenizer(checkpoint: Checkpoint) -> dict[str, object] | None:
    if not has_tokenizer(checkpoint.folder):
        return None
    try:
        tokenizer = checkpoint.tokenizer
    except InputError as error:
        return {"problem": str(error)}
    names = ("bos_token", "eos_token", "pad_token")
    return {"tokens": len(tokenizer), **{name: getattr(tokenizer, name) for name in names}}


def _chat_template(folder: Path) -> dict[str, object] | None:
    """Read from the files, since a folder may have a template and no tokenizer."""
    file = folder / "chat_template.jinja"  # goes first, as in transformers
    text = read_text(file) if file.exists() else tokenizer_config(folder).get("chat_template")
    if isinstance(text, list):  # several, by name
        text = next((t.get("template") for t in text if isinstance(t, dict) and t.get("name") == "default"), None)
    if not isinstance(text, str):
        return None
    return {
        "characters": len(text),
        "starts_with_bos": text.lstrip("{-% \n").startswith("bos_token"),
        "mentions_system": "system" in text,
        "text": text,
    }


def _adapter(folder: Path) -> dict[str, object]:
    raw = read_json(folder / "adapter_config.json")
    info = {"path": str(folder), "base_model_name_or_path": raw.get("base_model_name_or_path")}
    info |= {key: raw[key] for key in ADAPTER_KEYS if key in raw}
    info |= {key: raw[key] for key in ADAPTER_EXTRAS if raw.get(key)}
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return {**info, "trainable_parameters": None, "dtypes": None}
    tensors = read_header(file).values()
    return {
        **info,
        "trainable_parameters": sum(math.prod(entry.shape) for entry in tensors),
        "dtypes": _dtypes(tensors),
    }


def print_info(info: Mapping[str, Any]) -> None:
    """Prints what `checkpoint_info` found, for people; nothing in it steers their terminal."""
    print(printable(info["path"]))
    if info["config"] is not None:
        _print_section("config", info["config"])
        if info["quantization"] is not None:
            print(f"\nquantization: {info['quantization']}, by bitsandbytes")
        counts = {"total": info["parameters"], **info["parameters_by_module"]}
        _print_section("parameters", {name: f"{count:,}" for name, count in counts.items()})
        weights = info["weights"]
        if weights is None:
            print("\nweights: none in this folder")
        else:
            dtypes = _counted(weights["dtypes"])
            print(f"\nweights: {dtypes or 'none'} in {weights['files']} file(s), {weights['bytes']:,} bytes")
    if info["tokenizer"] is None:
        print("\ntokenizer: none")
    else:
        _print_section("tokenizer", info["tokenizer"])
    template = info["chat_template"]
    if template is None:
        print("\nchat template: none")
    else:
        start = template["text"].partition("\n")[0][:100]
        print(f"\nchat template: {template['characters']} characters")
        print(f"  begins with BOS: {_word(template['starts_with_bos'])}")
        print(f"  knows a system role: {_word(template['mentions_system'])}")
        print(f"  text: {printable(start)}{'' if start == template['text'] else ' ...'}")
    if not info["adapters"]:
        print("\nadapters: none")
    for adapter in info["adapters"]:
        parameters = adapter["trainable_parameters"]
        shown = {key: value for key, value in adapter.items() if key not in ("path", "trainable_parameters")}
        count = "no weights in this folder" if parameters is None else f"{parameters:,}"
        if adapter["dtypes"]:
            shown["dtypes"] = _counted(adapter["dtypes"])
        _print_section(f"adapter {adapter['path']}", {**shown, "trainable_parameters": count})


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} tensors of {dtype}" for dtype, count in counts.items())


def _word(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, dict):
        return ", ".join(f"{name}: {entry}" for name, entry in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _print_section(title: str, rows: Mapping[str, object]) -> None:
    print(f"\n{printable(title)}:")
    width = max(map(len, rows), default=0)
    for name, value in rows.items():
        print(f"  {name:<{width}}  {one_line(_word(value))}")
