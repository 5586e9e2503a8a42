"""Messages on their way to the model."""

from collections.abc import Mapping

from phi3_jax.data.chat import ChatTokenizer, check_length
from phi3_jax.data.formats import Conversation, Reading, Turn, read_row
from phi3_jax.system.errors import InputError


def read_messages(messages: object, beside: Mapping[str, object], where: str, reading: Reading) -> Conversation:
    """A conversation whose last message may be answered.

    Args:
        messages: A list of them, or its JSON text.
        beside: What the chat template gets, too, by the names that rows of training data have for it.
        where: What error messages call it.
        reading: Takes what nothing reads.

    Raises:
        InputError: For what is no list of messages.
    """
    conversation = read_row({**beside, "messages": messages}, where, format="messages", reading=reading)
    assert isinstance(conversation, Conversation)
    return conversation


def check_question(turns: tuple[Turn, ...], where: str) -> None:
    """Raises `InputError` where there is nothing to answer."""
    if not turns or turns[-1].role in ("system", "assistant"):
        raise InputError(f"{where}: has no message to answer; end with a user's message")


def chat_prompt(
    tokenizer: ChatTokenizer, turns: tuple[Turn, ...], where: str, given: Mapping[str, object] | None = None
) -> list[int]:
    """The tokens up to the answer to these turns.

    Args:
        tokenizer: Renders them.
        turns: What was said, the user's message last.
        where: What error messages call it.
        given: What the chat template gets beside them, such as tools.

    Raises:
        InputError: The chat template refuses the turns, does not show something or leaves the system message out, or a
            text is no Unicode.
    """
    for turn in turns:
        check_text(turn.content, where)
    answered = Conversation((*turns, Turn("assistant", "x")), given=given or {})
    tokens: list[int] = tokenizer.prompt(turns, given, where).tolist()
    if tokenizer.render(answered, where).dropped and not _shows_system(tokenizer, turns, given, tokens):
        raise InputError(
            f"{where}: the model's chat template has no system role and leaves the system message out; "
            "say it in the user's message"
        )
    return tokens


def _shows_system(
    tokenizer: ChatTokenizer, turns: tuple[Turn, ...], given: Mapping[str, object] | None, tokens: list[int]
) -> bool:
    """Whether the prompt differs without the system message, which some templates write in the last question alone."""
    others = tuple(turn for turn in turns if turn.role != "system")
    return bool(tokenizer.prompt(others, given).tolist() != tokens)


def check_text(text: str, where: str) -> None:
    """Raises `InputError` for bytes that were no UTF-8 when they were read, and for texts that are too long."""
    check_length(text, where)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: holds bytes that are not UTF-8; write it in UTF-8") from error
