"""The Rust library of tokenizers gives up by a panic: no `Exception`, and told to the terminal past Python."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from phi3_jax.system.errors import InputError


@contextmanager
def telling_panics(what: str) -> Iterator[None]:
    """Raises a panic within it as `InputError`, and nowhere else is it told.

    **Arguments**: `what` was to be tokenised.
    """
    try:
        with silent():
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


@contextmanager
def silent() -> Iterator[None]:
    """Keeps what the Rust library writes to the terminal by itself, past Python, from coming there."""
    try:
        before = {number: os.dup(number) for number in (1, 2)}
    except OSError:  # there is none
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    try:
        for number in before:
            os.dup2(nowhere, number)
        yield
    finally:
        for number, kept in before.items():
            os.dup2(kept, number)
            os.close(kept)
        os.close(nowhere)
