"""Tokens that nobody is to read: recognised in text, and replaced before it is shown or written."""

import os
import re
import shlex
from collections.abc import Sequence

VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
# Options of other libraries' scripts whose values are tokens; pad_token and the like are none.
OPTIONS = ("token", "hub_token", "auth_token", "use_auth_token", "access_token", "api_key", "password", "secret")
HIDDEN = "REDACTED"  # plain text in YAML, HTML and a shell
_SHORTEST = 8  # of a variable's value: a shorter one would be found all over a text
_FORMS = re.compile(
    r"""
    \b(?:hf|api_org)_(?:oauth_|jwt_)?[A-Za-z0-9]{16,}[\w.-]*    # Hugging Face
    | \bwandb_v\d_\w{16,}                                       # Weights & Biases, the newer ones
    | (?<=://)[^/\s@'"<>]+(?=@)                                 # user:token of a URL
    | (?<=Bearer[ ])[^\s'"<>,;]+
    | (?<=[?&])(?:(?:access_)?token|api_key|sig|X-Amz-(?:Signature|Credential|Security-Token))=[^&\s'"<>]+
    """,
    re.VERBOSE | re.IGNORECASE,
)
_remembered: set[str] = set()


def remember(token: object) -> None:
    """Hides a token from now on that was given as an argument, whatever its form."""
    if isinstance(token, str) and len(token) >= _SHORTEST:
        _remembered.add(token)


def redact(text: str) -> str:
    """The text with REDACTED in place of tokens: those of the environment (`VARIABLES`), those remembered, what
    looks like one of Hugging Face's or Weights & Biases', and users and signatures in URLs."""
    known = {value for name in VARIABLES if len(value := os.environ.get(name, "").strip()) >= _SHORTEST}
    for value in sorted(known | _remembered, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return _FORMS.sub(HIDDEN, text)


def redact_command(arguments: Sequence[str]) -> str:
    """A command line to copy, with REDACTED in place of tokens and of the values of `OPTIONS`."""
    shown, is_value = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        is_secret = name.startswith("--") and name.lstrip("-").split(".")[-1].replace("-", "_").lower() in OPTIONS
        shown.append(HIDDEN if is_value else f"{name}={HIDDEN}" if is_secret and equals else argument)
        is_value = is_secret and not equals
    return redact(shlex.join(shown))
