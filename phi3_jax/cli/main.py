"""`phi3-jax COMMAND …`: which command, and what becomes of its errors.

Each command is imported when it is called, so that help comes without waiting for JAX.
"""

import hashlib
import importlib
import logging
import os
import platform
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

from phi3_jax.config.names import did_you_mean
from phi3_jax.system.compat_xla import has_no_backend, is_out_of_memory
from phi3_jax.system.errors import InputError
from phi3_jax.system.leaving import leave
from phi3_jax.system.machine import look_at_machine
from phi3_jax.system.secrets import redact
from phi3_jax.system.telling import Verbosity, at_verbosity, verbosity
from phi3_jax.system.text import one_line

COMMANDS = {
    "demo": "The whole job on a built-in model and chat set, on a CPU.",
    "init": "Write a configuration for your rows and your device.",
    "recipes": "The configurations that come with the package.",
    "data": "What will be trained on: rows, formats, tokens, targets.",
    "train": "Fine-tune a model on chats.",
    "evaluate": "Measure a model, its adapters and merged checkpoints on the same chats.",
    "generate": "Answer prompts.",
    "chat": "Talk to a model and its adapters.",
    "lm-eval": "Run tasks of lm-evaluation-harness on a model.",
    "export": "Merge an adapter into its base, or make it portable.",
    "plan": "Whether a run fits on a device, and what it needs there.",
    "benchmark": "How fast the train step and decoding are.",
    "info": "What a checkpoint or an adapter holds, and how a run went.",
    "completion": "A script that has a shell complete these commands and their options.",
}
# What other programs call them.
_WORDS = {
    "train": "finetune fine-tune fine_tune tune sft lora qlora fit",
    "export --merge": "fuse merge merge-adapter merge_adapter",
    "export": "convert save",
    "generate": "infer inference predict answer complete prompt",
    "evaluate": "eval test score",
    "benchmark": "bench speed",
    "info": "inspect describe",
    "data": "dataset preview",
}

USAGE = f"""\
usage: phi3-jax COMMAND [options]

LoRA fine-tuning of Phi-3 in JAX.

commands:
{chr(10).join(f"  {name:<10} {text}" for name, text in COMMANDS.items())}

`phi3-jax COMMAND --help` lists a command's options; -v says more of what goes on, --quiet less.
Exit status: 0 done, 2 the input or the configuration is wrong (one line on standard error), 143 training was
stopped by SIGTERM and 130 by Ctrl-C, with a checkpoint saved, 1 anything else.
"""

_NO_DEVICE = (
    'JAX cannot use the devices of JAX_PLATFORMS={} ({}); install what it needs, such as "phi3_jax[cuda13]", or leave '
    "the variable out"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command (default: the process's arguments) and gives its exit status."""
    status = _run(argv)
    if argv is None:
        leave(status)
    return status


def _run(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:  # a process of its own
        sys.excepthook = _show_error
        if arguments[:1] not in (["lm-eval"], ["lm_eval"]):  # which has a form of its own
            logging.basicConfig(format="warning: %(message)s")
    try:
        name, *rest = _plain(arguments)
        if name == "--help":
            print(USAGE, end="")
        elif name == "--version":
            print(f"phi3-jax {version('phi3_jax')}")
        elif name not in COMMANDS:
            raise InputError(_unknown(name))
        else:
            with at_verbosity(_verbosity(rest)):
                _quiet()
                _keep_compiled()
                _leave_absent_devices()
                importlib.import_module(f"phi3_jax.cli.{name.replace('-', '_')}").run(rest)
    except InputError as error:
        print(f"phi3-jax: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except SystemExit as leaving:  # argparse, once it has printed its help
        return int(leaving.code or 0)
    except KeyboardInterrupt:
        print("phi3-jax: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as under `| head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to print has no reader
        return 141
    except (FloatingPointError, OSError) as error:  # of numbers; of files, networks and other processes
        print(f"phi3-jax: {_reason(error)}", file=sys.stderr)
        return 1
    except Exception as error:
        if has_no_backend(error):
            wanted = os.environ.get("JAX_PLATFORMS")
            print(
                f"phi3-jax: {one_line(_NO_DEVICE.format(wanted, str(error) or 'no plug-in for it'))}", file=sys.stderr
            )
            return 2
        if not is_out_of_memory(error) and not isinstance(error, MemoryError):
            raise
        reason = one_line(str(error).partition("\n")[0])[:200]
        print(f"phi3-jax: out of memory ({reason}); `phi3-jax plan` says what fits", file=sys.stderr)
        return 1
    return 0


def _plain(arguments: Sequence[str]) -> list[str]:
    """The arguments with a command, or `--help` or `--version`, first."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help", "help"):
        return [*rest[:1], "--help", *rest[1:]] if rest else ["--help"]
    if name in ("-V", "version"):
        name = "--version"
    hyphened = name.replace("_", "-")
    return [hyphened if hyphened in COMMANDS else name, *rest]


def _unknown(name: str) -> str:
    meant = next((command for command, words in _WORDS.items() if name in words.split()), None)
    near = f"; did you mean {meant}?" if meant else did_you_mean(name, COMMANDS)
    return f"unknown command {name}{near or ';'} {'T' if near else 't'}here are {', '.join(COMMANDS)}"


def _verbosity(arguments: Sequence[str]) -> Verbosity | None:
    """What the options of a command say of how much is said; None where they are silent."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    asked: dict[Verbosity, tuple[str, str]] = {"verbose": ("-v", "--verbose"), "quiet": ("-q", "--quiet")}
    given = [level for level, names in asked.items() if not set(names).isdisjoint(options)]
    if len(given) > 1:
        raise InputError("--verbose and --quiet are both given; leave one out")
    return given[0] if given else None


def _reason(error: FloatingPointError | OSError) -> str:
    """What an error says, in a line without tokens."""
    said = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        said = f"{error.filename}: {error.strerror}"
    return one_line(redact(said))


def _show_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What Python prints of an error that nobody catches, without tokens."""
    print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def _keep_compiled() -> None:
    """Has JAX keep what it compiles for the next run; JAX's own variables win.

    Programs for a CPU are for one kind of it, and a home folder may be seen from several.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "phi3_jax" / "compiled"
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        processor = ""
    features = [line for line in processor.splitlines() if line.startswith(("model name", "flags"))]
    kind = hashlib.sha256("\n".join(features).encode()).hexdigest()[:8]
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / f"{platform.machine()}-{kind}"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(4 * 2**30))  # bytes


def _leave_absent_devices() -> None:
    """Keeps JAX from looking for a TPU or a GPU, which it does aloud, where libtpu or the plug-in is installed only
    to plan with."""
    machine = look_at_machine()
    has_cuda = any(find_spec(f"jax_cuda{release}_plugin") for release in (12, 13))
    installed = {"tpu": find_spec("libtpu") is not None, "cuda": has_cuda}
    there = {"tpu": machine.has_tpu, "cuda": machine.has_nvidia}
    if any(installed[name] and not there[name] for name in installed):
        used = [name for name in installed if installed[name] and there[name]]
        os.environ.setdefault("JAX_PLATFORMS", ",".join([*used, "cpu"]))


def _quiet() -> None:
    """Keeps other libraries' warnings and progress bars off standard error, which is for our one line.

    Environment variables, because the libraries read them as they are imported; a user's own win. With --verbose
    their warnings are let through.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # which is told of where a process forks, unless it is set
    if not sys.stderr.isatty() or verbosity() == "quiet":
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if verbosity() == "verbose":
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    for name in ("absl", "jax", "orbax", "datasets", "transformers", "huggingface_hub", "filelock"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
