"""Regular expressions from files, matched within a bounded time.

They are Python's, for PEFT matches with `re`; but some expressions take `re` for ever, and it cannot be stopped.
The regex package reads the same language and has a limit of time.
"""

import math
import re

from phi3_jax.system.errors import InputError

SECONDS = 0.25  # of the processor, for a name; an honest expression takes microseconds
REPEATS = 10_000  # more characters than any name has; the regex package writes every one of them out
_EXAMPLE = "base_model.model.model.layers.31.self_attn.qkv_proj"  # of a name


def check_expression(field: str, expression: str) -> None:
    """Looks at an expression before anything is matched.

    Args:
        field: Where it is from, as an error names it.
        expression: What Python's `re` is to take.

    Raises:
        InputError: For what is no regular expression, for one that is very long or counts to very many, and for one
            that takes too long for a module's name.
    """
    if re.fullmatch(r"[\w.-]*", expression):
        return
    if len(expression) > 10_000:
        raise InputError(f"{field} has {len(expression):,} characters, expected a short expression; name the modules")
    try:
        re.compile(expression)
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"{field}: {expression!r} is no regular expression ({error})") from error
    # Blanks are left out, since the regex package takes `{ 9 }` for a count where Python may not.
    least = math.prod(max(1, int(count)) for count in re.findall(r"\{([0-9]+)", re.sub(r"\s", "", expression)))
    if least > REPEATS:
        raise InputError(f"{field}: {expression!r} counts to {least:,}, further than any name; name the modules")
    matches(field, expression, _EXAMPLE)


def matches(field: str, expression: str, name: str) -> bool:
    """Whether an expression fits a whole name.

    Raises:
        InputError: Where that takes more than `SECONDS`, and for what is no regular expression.
    """
    import regex  # when first needed: a fiftieth of a second

    try:
        return regex.fullmatch(expression, name, timeout=SECONDS) is not None
    except TimeoutError as error:
        raise InputError(
            f"{field}: {expression!r} could take for ever to match {name} (repeats within repeats, or many in a row); "
            "name the modules, or write it without"
        ) from error
    except (regex.error, RecursionError) as error:
        raise InputError(f"{field}: {expression!r} is no regular expression ({error}); correct it") from error
