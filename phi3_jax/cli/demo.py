"""`phi3-jax demo`: the whole job on the built-in model and chat set."""

from collections.abc import Sequence
from pathlib import Path

from phi3_jax.cli.parser import Parser
from phi3_jax.demo import demo_path
from phi3_jax.system.errors import InputError
from phi3_jax.system.files import storing, write_text


def run(argv: Sequence[str]) -> None:
    """Runs `phi3-jax demo`."""
    arguments = make_parser().parse(argv)
    if arguments.rows is not None:
        _write_rows(Path(arguments.rows))
        return

    from phi3_jax.demo.run import demo_config
    from phi3_jax.training.loop import train

    train(demo_config(arguments.output, arguments.seed))


def make_parser() -> Parser:
    """The options of `phi3-jax demo`."""
    parser = Parser("demo", "Fine-tune the built-in model on the built-in chat set; nothing is downloaded.")
    parser.add_argument("--output", default="out/demo", metavar="DIR", help="folder to write (default: out/demo)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument(
        "--rows",
        metavar="DIR",
        help="write 300 of its chats to DIR/chats.jsonl and 200 others to DIR/test.jsonl, to practise with, and stop",
    )
    return parser


def _write_rows(folder: Path) -> None:
    """Writes chats.jsonl and test.jsonl; files that are there are left alone."""
    for name, source, count in (("chats.jsonl", "orders_train.jsonl", 300), ("test.jsonl", "orders_eval.jsonl", 200)):
        path = folder / name
        if path.exists():
            raise InputError(f"{path} is there already; give another folder, or remove it")
        lines = demo_path(source).read_text(encoding="utf-8").splitlines(keepends=True)
        with storing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_text(path, "".join(lines[:count]))
        print(f"wrote {path}: {count} rows")
