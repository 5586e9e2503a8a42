"""`phi3-jax export`: an adapter merged into its base, made portable, or as it is; to a folder, to the hub, or both."""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from phi3_jax.cli.parser import Parser, add_hub_arguments, hub_of
from phi3_jax.config.hub_options import PushTarget
from phi3_jax.system.errors import InputError

if TYPE_CHECKING:
    from phi3_jax.hf.checkpoint import Checkpoint
    from phi3_jax.hf.push import HubRepository
    from phi3_jax.peft.adapter import PeftAdapter

DESCRIPTION = """Write an adapter in another form: merged into its base, or for vLLM and llama.cpp. Or upload it, in
such a form or as it is; a merged model's folder too."""
TEMPORARY = "phi3_jax-export-"


def run(argv: Sequence[str]) -> None:
    """Runs `phi3-jax export`."""
    arguments = make_parser().parse(argv)
    _check(arguments)
    if not (arguments.merge or arguments.portable):
        folder = _folder_as_it_is(arguments)
        repository = _repository(arguments)
        assert repository is not None
        _upload(repository, folder)
        return

    from phi3_jax.parallel.mesh import device_line
    from phi3_jax.system.telling import tell_first

    tell_first(device_line)
    adapter, base = _open(arguments)
    repository = _repository(arguments)
    if arguments.output is not None:
        output = Path(arguments.output)
        _write(arguments, adapter, base, output)
        print(f"wrote {output}")
        if repository is not None:
            _upload(repository, output)
    else:
        assert repository is not None
        with tempfile.TemporaryDirectory(prefix=TEMPORARY) as temporary:
            _write(arguments, adapter, base, Path(temporary) / "export")
            _upload(repository, Path(temporary) / "export")


def make_parser() -> Parser:
    """The options of `phi3-jax export`."""
    parser = Parser("export", DESCRIPTION)
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of an adapter, run or checkpoint, or hub id (PEFT)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--merge", action="store_true", help="base and adapter as one model that transformers loads")
    form.add_argument(
        "--portable",
        action="store_true",
        help="an adapter of one rank with its scale in the weights, for programs that read only r and lora_alpha",
    )
    parser.add_argument("--output", metavar="DIR", help="folder to write; must not hold anything yet")
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
    parser.add_argument("--push-to-hub", metavar="ID", help="upload it to this repository on the hub, owner/name")
    parser.add_argument("--private", action="store_true", help="make that repository private, where it is made")
    parser.add_argument("--hub-revision", metavar="BRANCH", help="branch to upload to, made where it is not there")
    add_hub_arguments(parser, revision="branch, tag or commit of the base on the hub; without one, --hub-revision")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """Raises `InputError` for options that contradict one another."""
    if arguments.portable and arguments.base_dtype:
        raise InputError("--base-dtype is for --merge; a portable adapter holds no base and is float32, leave it out")
    pushes = arguments.push_to_hub is not None
    for name, given in (("--private", arguments.private), ("--hub-revision", arguments.hub_revision)):
        if given and not pushes:
            raise InputError(f"{name} is for --push-to-hub, which is not given; give it, or leave this out")
    if arguments.merge or arguments.portable:
        if arguments.output is None and not pushes:
            raise InputError("--output is not given; name a folder to write to, or a repository with --push-to-hub")
    elif not pushes:
        raise InputError("expected one of --merge, --portable and --push-to-hub; see phi3-jax export --help")
    else:
        for name in ("output", "base", "base_dtype"):
            if getattr(arguments, name) is not None:
                option = name.replace("_", "-")
                raise InputError(f"--{option} is for --merge and --portable; what is uploaded as it is needs none")
        if arguments.revision is not None and arguments.hub_revision is not None:
            raise InputError("--revision and --hub-revision both name the branch to upload to; give one")
        arguments.hub_revision, arguments.revision = arguments.hub_revision or arguments.revision, None
    output = None if arguments.output is None else Path(arguments.output)
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: exists already; name another folder with --output")


def _folder_as_it_is(arguments: argparse.Namespace) -> Path:
    """The folder of the adapter or model that is uploaded as it is."""
    from phi3_jax.hf.files import CONFIG
    from phi3_jax.hf.push import check_uploadable
    from phi3_jax.peft.adapter import ALL_FILES, PeftAdapter
    from phi3_jax.system.reading import local_path

    path = local_path(arguments.adapter)
    if (path / CONFIG).is_file() and not (path / "adapter_config.json").exists():
        from phi3_jax.hf.checkpoint import Checkpoint

        Checkpoint.open(path).weights.raise_for_problems(path)
        return path
    folder = PeftAdapter.open(arguments.adapter, hub_of(arguments), patterns=ALL_FILES).folder
    check_uploadable(folder)
    return folder


def _open(arguments: argparse.Namespace) -> "tuple[PeftAdapter, Checkpoint]":
    """The adapter, and its base."""
    from phi3_jax.hf.files import CONFIG
    from phi3_jax.hf.hub import CHECKPOINT_FILES, LICENCE_FILES
    from phi3_jax.peft.adapter import ALL_FILES, PeftAdapter
    from phi3_jax.peft.base import open_base

    hub = hub_of(arguments)
    adapter = PeftAdapter.open(arguments.adapter, hub.at(None), patterns=ALL_FILES)
    # Copies of the base's weights in an adapter are held against the base's own.
    patterns = (*CHECKPOINT_FILES, *LICENCE_FILES) if arguments.merge or adapter.has_base_copies else (CONFIG,)
    return adapter, open_base(arguments.base, [adapter], hub, patterns=patterns)


def _repository(arguments: argparse.Namespace) -> "HubRepository | None":
    """The repository to upload to, if any. Before anything is computed: a wrong token or network shows at once."""
    if arguments.push_to_hub is None:
        return None
    from phi3_jax.hf.push import HubRepository

    return HubRepository.open(PushTarget(arguments.push_to_hub, arguments.private or None, arguments.hub_revision))


def _write(arguments: argparse.Namespace, adapter: "PeftAdapter", base: "Checkpoint", output: Path) -> None:
    """Writes the merged model or the portable adapter."""
    if arguments.merge:
        merge(adapter, base, output, dtype=arguments.base_dtype)
    else:
        make_portable(adapter, base, output)


def _upload(repository: "HubRepository", folder: Path) -> None:
    """Uploads a folder and says so; where that fails, with the command to try again."""
    from phi3_jax.hf.push import PushError, local_base

    if (note := local_base(folder)) is not None:
        print(note)
    try:
        left = repository.upload(folder, "Upload with phi3_jax")
    except PushError as error:
        if TEMPORARY in str(folder):
            raise PushError(f"{error}; nothing of it is kept without --output") from error
        again = repository.command(folder)
        raise PushError(f"{error}; {folder} is as it was, try again with: {again}") from error
    if left:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        print(f"not uploaded, since no part of an adapter or model: {', '.join(left[:5])}{more}")
    print(f"uploaded to {repository.url}")


def merge(adapter: "PeftAdapter", base: "Checkpoint", output: Path, *, dtype: str | None) -> None:
    """Writes the merged checkpoint with the tokenizer to `output`, which appears when it is whole."""
    from phi3_jax.hf.merge import save_merged
    from phi3_jax.hf.save_tokenizer import save_merged_tokenizer
    from phi3_jax.peft.card import merged_card
    from phi3_jax.peft.tokenizer import has_own
    from phi3_jax.system.files import storing, temporary_folder
    from phi3_jax.system.telling import taking

    if has_own(adapter) and base.quantization is None:  # a quantised one is refused below
        _ = base.tokenizer  # a line says where it is not the base's
    lora = adapter.load(base.shapes, base)
    with (
        taking(f"merging {adapter.name} into {base.name}"),
        storing(output),
        temporary_folder(output.parent, f".{output.name}.") as temporary,
    ):
        folder = temporary / "merged"
        save_merged(base, lora, folder, dtype=dtype)
        save_merged_tokenizer(base.folder, adapter.folder, folder)
        card = merged_card(adapter.config, base.name, dtype or base.stored_dtype)
        (folder / "README.md").write_text(card, encoding="utf-8")
        folder.replace(output)


def make_portable(adapter: "PeftAdapter", base: "Checkpoint", output: Path) -> None:
    """Writes the portable adapter, with the tokenizer that lies beside the adapter, to `output`, which appears when it
    is whole; of the base only the shapes matter."""
    from phi3_jax.hf.save_tokenizer import copy_files
    from phi3_jax.peft.portable import portable
    from phi3_jax.peft.save import save_adapter
    from phi3_jax.system.files import storing, temporary_folder

    lora = portable(adapter.load(base.shapes, base), base.config.num_hidden_layers)
    with storing(output), temporary_folder(output.parent, f".{output.name}.") as temporary:
        folder = temporary / "portable"
        save_adapter(folder, lora, base_model_name_or_path=base.name, revision=base.revision)
        copy_files(adapter.folder, folder)
        folder.replace(output)
