"""The one error that the user caused and can mend."""

from phi3_jax.system.secrets import redact
from phi3_jax.system.text import one_line


class InputError(ValueError):
    """Bad input or configuration, told in one line.

    The message says what was found, what was expected and what to do. The command line prints it
    on standard error and exits with status 2; in Python it is a `ValueError`.

    Messages quote files and names that anybody may have written: control characters, line breaks and
    marks that turn text around are written out (`\\x1b`), and what is very long is cut in its middle. Of
    tokens nothing is said, see `phi3_jax.system.secrets`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(redact(message)))
