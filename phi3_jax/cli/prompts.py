"""The prompts of `phi3-jax generate`: read, and turned into tokens."""

import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from phi3_jax.chat.prompt import chat_prompt, check_question, check_text, read_messages
from phi3_jax.data.chat import ChatTokenizer
from phi3_jax.data.formats import Reading, Row, Turn
from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.system.errors import InputError
from phi3_jax.system.panic import telling_panics
from phi3_jax.system.text import counted, printable


@dataclass(frozen=True)
class Prompt:
    """What is to be answered.

    Attributes:
        where: Its name in error messages.
        row: As it was given, `{"prompt": …}` or `{"messages": …}`.
        turns: Up to the answer.
        given: What the chat template gets beside them, such as tools.
    """

    where: str
    row: Row
    turns: tuple[Turn, ...]
    given: Mapping[str, object] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The first line of what is asked."""
        text = self.turns[-1].content.strip()
        return text.splitlines()[0] if text else ""


def text_prompt(text: str, where: str) -> Prompt:
    """What the user says, and no more."""
    return Prompt(where, {"prompt": text}, (Turn("user", text),))


def read_prompts(file: str) -> list[Prompt]:
    """The prompts of a file, `-` for standard input: one a line, or JSON lines with `prompt` or `messages`.

    A file is JSON lines by its name (.jsonl), standard input by its first line. Blank lines are left out, and
    so is an assistant's message at the end, in whose place the answer comes. What else an object holds goes to the
    chat template, as in training rows; what nothing reads is told on standard error.

    Raises:
        InputError: A line, which is named, cannot be read, or there is no prompt.
    """
    name = "standard input" if file == "-" else file
    try:
        raw = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: is not UTF-8 (byte {error.start}); convert it") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise InputError(f"{name}: holds no prompt; give one a line")
    is_json = _is_object(lines[0][1]) if file == "-" else file.endswith(".jsonl")
    if not is_json:
        return [text_prompt(line.removesuffix("\r"), f"{name}, line {number}") for number, line in lines]
    reading = Reading()
    prompts = [_read_object(line, f"{name}, line {number}", reading) for number, line in lines]
    if reading.passed_over:
        counts = Counter(reading.passed_over).items()
        keys = ", ".join(f"{key} ({counted(count, 'prompt')})" for key, count in counts)
        print(printable(f"{name}: passed over, since nothing reads it: {keys}"), file=sys.stderr)
    return prompts


def prompt_tokens(prompt: Prompt, tokenizer: Tokenizer, chat: ChatTokenizer | None, system: str | None) -> list[int]:
    """The prompt's tokens.

    Args:
        prompt: What is asked.
        tokenizer: Of the checkpoint.
        chat: Its chat template; None for the prompt as it is.
        system: For prompts that bring no system message.

    Raises:
        InputError: There are messages and no template, and as `chat_prompt` raises it.
    """
    if chat is None:
        if "prompt" not in prompt.row or len(prompt.turns) > 1 or prompt.given:
            raise InputError(f"{prompt.where}: has messages, which --raw has no place for; give a prompt")
        text = prompt.turns[0].content
        check_text(text, prompt.where)
        with telling_panics(prompt.where, tokenizer.backend_tokenizer, [text]):
            return list(tokenizer(text)["input_ids"])
    turns = prompt.turns
    if system and turns[0].role != "system":
        turns = (Turn("system", system), *turns)
    return chat_prompt(chat, turns, prompt.where, prompt.given)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _read_object(line: str, where: str, reading: Reading) -> Prompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is not JSON ({error}); expected an object with prompt or messages") from error
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise InputError(f"{where}: expected an object with either prompt or messages, found {keys or 'none'}")
    key = "prompt" if "prompt" in row else "messages"
    value = row[key]
    messages = [{"role": "user", "content": value}] if isinstance(value, str) and key == "prompt" else value
    others = {name: held for name, held in row.items() if name != key}
    example = read_messages(messages, others, where, reading)
    turns = example.turns
    if turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    check_question(turns, where)
    return Prompt(where, {key: value}, turns, example.given)
