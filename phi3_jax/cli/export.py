"""`phi3-jax export`: an adapter merged into its base, as a checkpoint of its own."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from phi3_jax.cli.parser import Parser
from phi3_jax.config import Phi3Config
from phi3_jax.errors import InputError

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
    parser = Parser("export", "Merge an adapter into its base, as a checkpoint that transformers loads.")
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter folder or hub id (PEFT)")
    parser.add_argument("--merge", action="store_true", required=True, help="write base and adapter as one model")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write; must not hold anything yet")
    parser.add_argument("--base", metavar="PATH", help="base checkpoint (default: the one that the adapter names)")
    parser.add_argument(
        "--base-dtype",
        choices=("bfloat16", "float32", "float16"),
        help="type of the weights written (default: that of the base)",
    )
    parser.add_argument("--local-files-only", action="store_true", help="never ask the network")
    arguments = parser.parse(argv)
    merge(
        arguments.adapter,
        Path(arguments.output),
        base=arguments.base,
        dtype=arguments.base_dtype,
        local_files_only=arguments.local_files_only,
    )
    print(f"wrote {arguments.output}")


def merge(adapter: str, output: Path, *, base: str | None, dtype: str | None, local_files_only: bool) -> None:
    """Writes the merged checkpoint with the tokenizer to `output`, which appears when it is whole."""
    from phi3_jax.hf.checkpoint import load_model, save_model
    from phi3_jax.hf.hub import resolve_checkpoint
    from phi3_jax.hf.peft import load_adapter, read_adapter_config
    from phi3_jax.lora import merge_lora

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: exists already; name another folder with --output")
    adapter_folder = resolve_checkpoint(adapter, local_files_only=local_files_only)
    base = base or read_adapter_config(adapter_folder).base_model_name_or_path
    if not base:
        raise InputError(f"{adapter_folder / 'adapter_config.json'}: names no base model; give it with --base")
    base_folder = resolve_checkpoint(base, local_files_only=local_files_only)
    model = load_model(base_folder, dtype=dtype or _stored_dtype(base_folder))
    merged = merge_lora(model, load_adapter(str(adapter_folder), model))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
        folder = Path(temporary) / "merged"
        save_model(merged, folder)
        _copy_tokenizer(adapter_folder, base_folder, folder)
        folder.replace(output)


def _stored_dtype(folder: Path) -> str:
    """What config.json says that the weights are stored in; bfloat16, as Phi-3's are, where it is silent."""
    raw = json.loads(Phi3Config.from_pretrained(folder).source)
    stored = str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16")
    return stored if stored in ("float32", "float16") else "bfloat16"


def _copy_tokenizer(adapter: Path, base: Path, target: Path) -> None:
    """The adapter's tokenizer, with the template it was trained with, or else the base's; never a mixture."""
    complete = any((adapter / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    source = adapter if complete else base
    files = [source / name for name in TOKENIZER_FILES]
    for file in files:
        if file.is_file():
            shutil.copyfile(file, target / file.name)
