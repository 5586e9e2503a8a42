"""`NAME=PATH` of an adapter, or a path alone."""

import os
import re
from pathlib import Path


def named(text: str) -> tuple[str, str]:
    """The name and the path of `NAME=PATH`, or of a path or hub id alone.

    Without a name it is the last part of the path, or the one before where that is only `adapter` or `model`,
    as training names what it writes; letters, digits and any of . _ + - of it.

    Example:
        >>> named("orders=out/adapter")
        ('orders', 'out/adapter')
        >>> named("out/run-3/adapter")
        ('run-3', 'out/run-3/adapter')
    """
    name, equals, path = text.partition("=")
    if equals and name and path and "/" not in name and not os.path.exists(text):
        return name, path
    *_, above, last = ("", *Path(os.path.abspath(os.path.expanduser(text))).parts)
    return re.sub(r"[^\w.+-]", "_", above if last in ("adapter", "model") else last), text
