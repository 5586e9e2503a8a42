"""`phi3-jax lm-eval`: lm-evaluation-harness's own command, with a model of ours."""

import argparse
import contextlib
import io
import traceback
from collections.abc import Sequence

from phi3_jax.cli.parser import Parser, add_base_arguments
from phi3_jax.system.compat import HarnessCommand, harness_command
from phi3_jax.system.errors import InputError

BATCH_SIZE = "8"  # the harness's own default is 1


def run(argv: Sequence[str]) -> None:
    """Runs `phi3-jax lm-eval`."""
    parser = make_parser()
    arguments, rest = parser.parse_known_args(parser.spelt(argv))

    import phi3_jax.harness  # noqa: F401  registers the model, and says how to install what is missing

    command, harness_arguments = _parse(rest)
    given = {
        "pretrained": arguments.model,
        "adapter": arguments.adapter,
        "dtype": arguments.dtype,
        "quantization": arguments.quantization,
        "revision": arguments.revision,
        "cache_dir": arguments.cache_dir,
        "local_files_only": arguments.local_files_only or None,
    }
    own = {name: value for name, value in given.items() if value is not None}
    harness_arguments.model_args = {**(harness_arguments.model_args or {}), **own}
    if not hasattr(harness_arguments, "batch_size") and harness_arguments.config is None:
        harness_arguments.batch_size = BATCH_SIZE

    from lm_eval.utils import setup_logging

    from phi3_jax.parallel.mesh import device_line
    from phi3_jax.system.telling import tell

    tell(device_line())
    setup_logging()
    try:
        command.execute(harness_arguments)
    except ValueError as error:
        # What the harness itself finds wrong, a task that does not exist for one, is the user's to mend;
        # what fails deeper down is not.
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if isinstance(error, InputError) or not frame.f_globals["__name__"].startswith("lm_eval."):
            raise
        raise InputError(str(error)) from error


def make_parser() -> Parser:
    """Our own options of `phi3-jax lm-eval`."""
    parser = Parser("lm-eval", "Run lm-evaluation-harness's tasks on a model.")
    add_base_arguments(parser)
    parser.add_argument("--adapter", metavar="PATH", help="folder of an adapter, run or checkpoint, or hub id (PEFT)")
    parser.epilog = (
        "All other options are those of `lm-eval run`, such as --tasks, --num_fewshot, --limit, --apply_chat_template, "
        "--gen_kwargs, --include_path, --output_path, --log_samples and --batch_size (here 8 where it is not given); "
        "`lm-eval run --help` lists them."
    )
    return parser


def _parse(rest: Sequence[str]) -> tuple[HarnessCommand, argparse.Namespace]:
    """The harness's command and what its parser makes of the options that are not ours.

    Raises `InputError` with the parser's last line, which says what is wrong; usage precedes it.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return harness_command(["run", "--model", "phi3_jax", *rest])
    except SystemExit as leaving:
        raise InputError(said.getvalue().strip().splitlines()[-1]) from leaving
