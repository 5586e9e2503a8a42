"""`phi3-jax demo`: the whole job on the built-in model and chat set."""

from collections.abc import Sequence

from phi3_jax.cli.parser import Parser


def run(argv: Sequence[str]) -> None:
    """Runs `phi3-jax demo`."""
    parser = Parser("demo", "Fine-tune the built-in model on the built-in chat set; nothing is downloaded.")
    parser.add_argument("--output", default="out/demo", metavar="DIR", help="folder to write (default: out/demo)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    arguments = parser.parse(argv)

    from phi3_jax.demo.run import demo_config
    from phi3_jax.training.loop import train

    train(demo_config(arguments.output, arguments.seed))
