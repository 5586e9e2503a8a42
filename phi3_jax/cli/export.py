"""`phi3-jax export`: an adapter merged into its base, or made portable."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from phi3_jax.cli.parser import Parser, add_hub_arguments, hub_of
from phi3_jax.system.errors import InputError

if TYPE_CHECKING:
    from phi3_jax.hf.checkpoint import Checkpoint
    from phi3_jax.peft.adapter import PeftAdapter


def run(argv: Sequence[str]) -> None:
    """Runs `phi3-jax export`."""
    arguments = make_parser().parse(argv)
    if arguments.portable and arguments.base_dtype:
        raise InputError("--base-dtype is for --merge; a portable adapter holds no base and is float32, leave it out")
    output = Path(arguments.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: exists already; name another folder with --output")

    from phi3_jax.hf.files import CONFIG
    from phi3_jax.hf.hub import CHECKPOINT_FILES, LICENCE_FILES
    from phi3_jax.peft.adapter import ALL_FILES, PeftAdapter
    from phi3_jax.peft.base import open_base

    hub = hub_of(arguments)
    adapter = PeftAdapter.open(arguments.adapter, hub.at(None), patterns=ALL_FILES)
    # Copies of the base's weights in an adapter are held against the base's own.
    patterns = (*CHECKPOINT_FILES, *LICENCE_FILES) if arguments.merge or adapter.has_base_copies else (CONFIG,)
    base = open_base(arguments.base, [adapter], hub, patterns=patterns)
    if arguments.merge:
        merge(adapter, base, output, dtype=arguments.base_dtype)
    else:
        make_portable(adapter, base, output)
    print(f"wrote {output}")


def make_parser() -> Parser:
    """The options of `phi3-jax export`."""
    parser = Parser("export", "Write an adapter in another form: merged into its base, or for vLLM and llama.cpp.")
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of an adapter, run or checkpoint, or hub id (PEFT)")
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument("--merge", action="store_true", help="base and adapter as one model that transformers loads")
    form.add_argument(
        "--portable",
        action="store_true",
        help="an adapter of one rank with its scale in the weights, for programs that read only r and lora_alpha",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write; must not hold anything yet")
    parser.add_argument(
        "--base",
        "--model",
        metavar="PATH",
        help="base checkpoint (default: the one that the adapter was trained on, at its revision)",
    )
    parser.add_argument(
        "--base-dtype",
        choices=("bfloat16", "float32", "float16"),
        help="with --merge: type of the weights written (default: that of the base)",
    )
    add_hub_arguments(parser, revision="branch, tag or commit of the base on the hub")
    return parser


def merge(adapter: "PeftAdapter", base: "Checkpoint", output: Path, *, dtype: str | None) -> None:
    """Writes the merged checkpoint with the tokenizer to `output`, which appears when it is whole."""
    from phi3_jax.hf.merge import save_merged
    from phi3_jax.hf.save_tokenizer import save_merged_tokenizer
    from phi3_jax.system.files import storing, temporary_folder

    lora = adapter.load(base.shapes, base)
    with storing(output), temporary_folder(output.parent, f".{output.name}.") as temporary:
        folder = temporary / "merged"
        save_merged(base, lora, folder, dtype=dtype)
        save_merged_tokenizer(base.folder, adapter.folder, folder)
        folder.replace(output)


def make_portable(adapter: "PeftAdapter", base: "Checkpoint", output: Path) -> None:
    """Writes the portable adapter to `output`; of the base only the shapes matter."""
    from phi3_jax.peft.portable import portable
    from phi3_jax.peft.save import save_adapter

    lora = portable(adapter.load(base.shapes, base), base.config.num_hidden_layers)
    save_adapter(output, lora, base_model_name_or_path=base.name, revision=base.revision)
