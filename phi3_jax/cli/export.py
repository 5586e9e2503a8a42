"""`phi3-jax export`: an adapter merged into its base, or made portable."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phi3_jax.cli.parser import Parser
from phi3_jax.config.model import Phi3Config
from phi3_jax.system.errors import InputError
from phi3_jax.system.reading import check_file

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


def run(argv: Sequence[str]) -> None:
    parser = Parser("export", "Write an adapter in another form: merged into its base, or for vLLM and llama.cpp.")
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter folder or hub id (PEFT)")
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument("--merge", action="store_true", help="base and adapter as one model that transformers loads")
    form.add_argument(
        "--portable",
        action="store_true",
        help="an adapter of one rank with its scale in the weights, for programs that read only r and lora_alpha",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write; must not hold anything yet")
    parser.add_argument("--base", metavar="PATH", help="base checkpoint (default: the one that the adapter names)")
    parser.add_argument(
        "--base-dtype",
        choices=("bfloat16", "float32", "float16"),
        help="with --merge: type of the weights written (default: that of the base)",
    )
    parser.add_argument("--local-files-only", action="store_true", help="never ask the network")
    arguments = parser.parse(argv)
    if arguments.portable and arguments.base_dtype:
        raise InputError("--base-dtype is for --merge; a portable adapter holds no base and is float32, leave it out")
    output = Path(arguments.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: exists already; name another folder with --output")
    source = _Source.find(arguments.adapter, arguments.base, arguments.local_files_only, arguments.portable)
    if arguments.merge:
        merge(source, output, dtype=arguments.base_dtype)
    else:
        make_portable(source, output)
    print(f"wrote {output}")


@dataclass(frozen=True)
class _Source:
    """What is exported. **Fields**: `adapter` and `base`, local folders; `base_name`, the base as it was named."""

    adapter: Path
    base: Path
    base_name: str

    @classmethod
    def find(cls, adapter: str, base: str | None, local_files_only: bool, config_only: bool) -> "_Source":
        """**Arguments**: `config_only`, that of the base only config.json is needed."""
        from phi3_jax.hf.hub import CHECKPOINT_FILES, resolve_checkpoint
        from phi3_jax.peft.adapter import read_adapter_config

        folder = resolve_checkpoint(adapter, local_files_only=local_files_only)
        name = base or read_adapter_config(folder).base_model_name_or_path
        if not name:
            raise InputError(f"{folder / 'adapter_config.json'}: names no base model; give it with --base")
        patterns = ("config.json",) if config_only else CHECKPOINT_FILES
        return cls(folder, resolve_checkpoint(name, local_files_only=local_files_only, patterns=patterns), name)


def merge(source: _Source, output: Path, *, dtype: str | None) -> None:
    """Writes the merged checkpoint with the tokenizer to `output`, which appears when it is whole."""
    from phi3_jax.hf.bnb import read_bnb_config
    from phi3_jax.hf.checkpoint import load_model, read_config, save_model
    from phi3_jax.lora import merge_lora
    from phi3_jax.peft.adapter import load_adapter
    from phi3_jax.system.files import storing, temporary_folder

    if read_bnb_config(read_config(source.base), source.base / "config.json") is not None:
        raise InputError(
            f"{source.base}: its weights are quantised, and merged ones would be rounded again; give the unquantised "
            "checkpoint with --base"
        )
    files = _tokenizer_files(source.adapter, source.base)
    model = load_model(source.base, dtype=dtype or _stored_dtype(source.base))
    merged = merge_lora(model, load_adapter(str(source.adapter), model))
    with storing(output), temporary_folder(output.parent, f".{output.name}.") as temporary:
        folder = temporary / "merged"
        save_model(merged, folder)
        for file in files:
            shutil.copyfile(file, folder / file.name)
        folder.replace(output)


def make_portable(source: _Source, output: Path) -> None:
    """Writes the portable adapter to `output`; of the base only the shapes matter."""
    from phi3_jax.hf.checkpoint import abstract_model
    from phi3_jax.peft.adapter import load_adapter, save_adapter
    from phi3_jax.peft.portable import portable

    config = Phi3Config.from_pretrained(source.base)
    lora = load_adapter(str(source.adapter), abstract_model(config))
    save_adapter(output, portable(lora, config.num_hidden_layers), base_model_name_or_path=source.base_name)


def _stored_dtype(folder: Path) -> str:
    """What config.json says that the weights are stored in; bfloat16, as Phi-3's are, where it is silent."""
    raw = json.loads(Phi3Config.from_pretrained(folder).source)
    stored = str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16")
    return stored if stored in ("float32", "float16") else "bfloat16"


def _tokenizer_files(adapter: Path, base: Path) -> list[Path]:
    """The adapter's tokenizer, with the template it was trained with, or else the base's; never a mixture.

    Raises `InputError` for a link out of the folder, whose target would be copied.
    """
    complete = any((adapter / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    source = adapter if complete else base
    files = [source / name for name in TOKENIZER_FILES if (source / name).exists()]
    for file in files:
        check_file(file)
    return files
