"""Regular expressions from files: refused where matching a module's name could take for ever."""

import importlib
import re
from typing import Any

from phi3_jax.system.errors import InputError

# Python's own parser of expressions; it has no public name.
_parser: Any = importlib.import_module("re._parser")

NAME = 64  # characters of a module's name, at most
# A matcher that goes back tries every way to part a name among the repeats of an expression.
MAX_WAYS = 10**8
_TOO_MANY = MAX_WAYS + 1


def check_expression(field: str, expression: str) -> None:
    """Raises `InputError` for what is no regular expression, and for one that can be matched in more
    than 10^8 ways, which only repeats within repeats, or many of them in a row, can."""
    if len(expression) > 10_000:
        raise InputError(f"{field} has {len(expression):,} characters, expected a short expression; name the modules")
    try:
        re.compile(expression)
        ways = _ways(_parser.parse(expression))
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"{field}: {expression!r} is no regular expression ({error})") from error
    if ways > MAX_WAYS:
        raise InputError(
            f"{field}: {expression!r} could take for ever to match (repeats within repeats, or many in a row); name "
            "the modules, or write it without"
        )


def _ways(items: Any) -> int:
    """In how many ways a sequence can match texts of `NAME` characters, at most."""
    ways = 1
    for operator, value in items:
        ways = min(_TOO_MANY, ways * _ways_of(str(operator), value))
    return ways


def _ways_of(operator: str, value: Any) -> int:
    if operator in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        least, most, repeated = value
        least, most = min(int(least), NAME), min(int(most), NAME)
        inner = _ways(repeated)
        if inner > 1 and most > 1:
            return min(_TOO_MANY, inner**most)
        return inner * (most - least + 1)
    if operator == "BRANCH":
        return sum(_ways(branch) for branch in value[1])
    if operator == "SUBPATTERN":
        return _ways(value[3])
    if operator in ("ASSERT", "ASSERT_NOT"):
        return _ways(value[1])
    if operator == "ATOMIC_GROUP":
        return _ways(value)
    if operator == "GROUPREF_EXISTS":
        return _ways(value[1]) + _ways(value[2] or ())
    return 1
