"""The Rust library of tokenizers gives up by a panic: no `Exception`, and told to the terminal past Python.

Rust writes what it has to say of a panic straight to file descriptor 2, and nothing in Python can have it do
otherwise; descriptors belong to the whole process, so that turning them away would lose what other threads print.
What panics in practice are a tokenizer's own regular expressions, by going back too often, and models of other
kinds than Phi's when they are read. So what is not like Phi's tokenizers is first tried in a process of its own,
whose words are read and not shown. For the others that is not worth a process, nor is it paid for: should one of
them panic all the same, Rust's words are on the terminal and the error is still told in one line.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from phi3_jax.system.compat import step_state
from phi3_jax.system.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# How Phi-4 (tiktoken's cl100k_base) and Phi-4-mini (o200k_base) cut a text into words; neither goes back far.
_TRUSTED = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"{_CONTRACTIONS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


@contextmanager
def telling_panics(what: str, tokenizer: "Tokenizer", texts: Sequence[str]) -> Iterator[None]:
    """Raises a panic within it as `InputError`.

    Args:
        what: How the error names the texts.
        tokenizer: The one that is used within.
        texts: What is tokenised with it.
    """
    try:
        if may_panic(tokenizer):
            attempt(tokenizer.to_str(), texts)
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{what}: the tokenizer gives up ({reason}); give a checkpoint with another tokenizer.json"
        ) from error


def is_panic(error: BaseException) -> bool:
    """Whether the Rust library has given up, which Python does not count among the exceptions."""
    return type(error).__name__ == "PanicException"


class PanicException(Exception):
    """The library has given up in a process of its own."""


def may_panic(tokenizer: "Tokenizer") -> bool:
    """Whether a tokenizer has regular expressions that nothing is known of."""
    return _has_unknown([step_state(step) for step in (tokenizer.normalizer, tokenizer.pre_tokenizer)])


def may_panic_when_read(spec: Mapping[str, object]) -> bool:
    """Whether what a tokenizer.json holds is unlike Phi's tokenizers."""
    model = spec.get("model")
    is_usual = isinstance(model, dict) and model.get("type") == "BPE" and not model.get("continuing_subword_prefix")
    return not is_usual or _has_unknown([spec.get("normalizer"), spec.get("pre_tokenizer")])


def _has_unknown(states: list[object]) -> bool:
    return any(expression not in _TRUSTED for expression in _expressions(states))


def _expressions(state: object) -> Iterator[object]:
    if isinstance(state, dict):
        if "Regex" in state:
            yield state["Regex"]
        state = list(state.values())
    if isinstance(state, list):
        for part in state:
            yield from _expressions(part)


def attempt(tokenizer: str, texts: Sequence[str]) -> None:
    """Has texts tokenised in another process, by what a tokenizer.json holds.

    Raises:
        PanicException: Where the library gives up, or ends that process.
    """
    # -P: not the folder of the script, whose modules have other names than what it imports.
    program = [sys.executable, "-P", str(Path(__file__).with_name("panic_trial.py"))]
    request = json.dumps([tokenizer, list(texts)])
    done = subprocess.run(program, input=request, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PanicException(done.stdout.strip() or f"its process ended with status {done.returncode}")
