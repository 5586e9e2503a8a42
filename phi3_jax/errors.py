"""The one error that the user caused and can mend."""


class InputError(ValueError):
    """Bad input or configuration, told in one line.

    The message says what was found, what was expected and what to do. The command line prints it
    on standard error and exits with status 2; in Python it is a `ValueError`.
    """
