"""Messages on their way to the model."""

from phi3_jax.data.chat import ChatTokenizer, check_length
from phi3_jax.data.formats import Conversation, Turn
from phi3_jax.system.errors import InputError


def chat_prompt(tokenizer: ChatTokenizer, turns: tuple[Turn, ...], where: str) -> list[int]:
    """The tokens up to the answer to these turns.

    Raises `InputError` for what the chat template refuses, for a system message that it leaves out, and for
    text that is no Unicode.
    """
    for turn in turns:
        check_text(turn.content, where)
    if tokenizer.render(Conversation((*turns, Turn("assistant", "x"))), where).dropped:
        raise InputError(
            f"{where}: the model's chat template has no system role and leaves the system message out; "
            "say it in the user's message"
        )
    return tokenizer.prompt(turns).tolist()


def check_text(text: str, where: str) -> None:
    """Raises `InputError` for bytes that were no UTF-8 when they were read, and for texts that are too long."""
    check_length(text, where)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: holds bytes that are not UTF-8; write it in UTF-8") from error
