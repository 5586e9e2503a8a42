"""The conversation: what has been said, who answers, and how."""

import json
from collections.abc import Callable, Container, Mapping
from dataclasses import fields
from pathlib import Path

from phi3_jax.chat.prompt import chat_prompt, check_text
from phi3_jax.config.generation import OF_CHECKPOINT, SAMPLING, GenerationConfig
from phi3_jax.config.names import BASE, NONE, did_you_mean
from phi3_jax.data.chat import ChatTokenizer
from phi3_jax.data.formats import Turn
from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.generation.stream import stream_answer
from phi3_jax.generation.text import Answer, answer_with_each, check_prompt, derived_seed
from phi3_jax.lora import Lora
from phi3_jax.model.phi3 import Phi3ForCausalLM
from phi3_jax.system.errors import InputError

# The settings that a conversation can change: all but those that belong to the checkpoint.
SETTINGS = tuple(
    field.name for field in fields(GenerationConfig) if field.name not in (*OF_CHECKPOINT, "num_return_sequences")
)

Write = Callable[[str], None]
IsStopped = Callable[[], bool]


class Session:
    """A conversation with a model.

    Args:
        model: Answers.
        tokenizer: The checkpoint's, with its chat template.
        settings: How to answer; `eos_token_id` should be `end_token_ids`.
        adapters: By name; the first of them answers, without any the base.
        load: Reads an adapter from a folder or hub id.
        system: System message.
        notice: Called with one line that the user should see before the answer.

    Attributes:
        turns: All that was said.
        forgotten: How many of the oldest turns no longer fit the model's positions.
        adapter: Name of the adapter that answers, None for the base.

    Raises:
        InputError: The tokenizer has no chat template, or the template no place for a system message.
    """

    def __init__(
        self,
        model: Phi3ForCausalLM,
        tokenizer: Tokenizer,
        settings: GenerationConfig,
        *,
        adapters: Mapping[str, Lora] | None = None,
        load: Callable[[str], Lora],
        system: str | None = None,
        notice: Write = lambda line: None,
    ) -> None:
        self.chat = ChatTokenizer(tokenizer)
        if not self.chat.has_template:
            raise InputError("the model's tokenizer has no chat template, so there is no chat; use generate --raw")
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.adapters: dict[str, Lora] = dict(adapters or {})
        self.adapter = next(iter(self.adapters), None)
        self.notice = notice
        self._load = load
        self._answers = 0
        self.reset()
        self.system: str | None = None
        self.set_system(system)

    def reset(self) -> None:
        """Forgets what was said; system message, adapters and settings stay."""
        self.turns: list[Turn] = []
        self.forgotten = 0

    def say(self, text: str, write: Write, is_stopped: IsStopped = lambda: False) -> Answer:
        """Adds a message and its answer, which is written while it comes.

        A message that cannot be answered, or whose answer is stopped before its first word, is taken back.
        """
        self.turns.append(Turn("user", text))
        try:
            answer = self._answer(write, is_stopped)
        except BaseException:
            self.turns.pop()
            raise
        if is_stopped() and not answer.text.strip():
            self.turns.pop()
            self.notice("stopped before the first word; the message is taken back")
            return answer
        self.turns.append(Turn("assistant", answer.text))
        return answer

    def retry(self, write: Write, is_stopped: IsStopped = lambda: False) -> Answer:
        """Answers the last message again, in place of its answer; where tokens are drawn, with other draws."""
        kept = self._last_message()
        before, self.turns = self.turns, self.turns[:kept]
        try:
            answer = self.say(before[kept].content, write, is_stopped)
        except BaseException:
            self.turns = before
            raise
        if len(self.turns) == kept:
            self.turns = before
        return answer

    def compare(self, text: str | None = None) -> dict[str, Answer]:
        """What base and adapter answer to a message, or to the last one again. The conversation stays as it is."""
        if self.adapter is None:
            names = ", ".join(self.adapters)
            raise InputError(
                f"the base answers now; choose what to compare it with: /adapter NAME ({names})"
                if names
                else "there is no adapter to compare the base with; load one: /adapter NAME=PATH"
            )
        turns = self.turns[: self._last_message() + 1] if text is None else [*self.turns, Turn("user", text)]
        prompt = self._prompt(turns)
        both: dict[str, Lora | None] = {BASE: None, self.adapter: self.adapters[self.adapter]}
        found = answer_with_each(self.model, self.tokenizer, [prompt], both, settings=self._own_settings())
        answers = {name: answer for _, name, answer in found}
        return {name: answers[name] for name in both}

    def switch(self, name: str) -> None:
        """Lets another adapter answer, or with `none` (or `base`) the base."""
        if name in (NONE, BASE):
            self.adapter = None
            return
        if name not in self.adapters:
            there = ", ".join([*self.adapters, NONE])
            raise InputError(f"there is no adapter {name}; there are {there}; /adapter NAME=PATH loads another")
        self.adapter = name

    def load(self, name: str, path: str) -> None:
        """Reads an adapter, under a name that is free, and lets it answer."""
        check_name(name, self.adapters)
        self.adapters[name] = self._load(path)
        self.adapter = name

    def set_system(self, text: str | None) -> None:
        """Another system message, or none, from now on."""
        if text:
            chat_prompt(self.chat, (Turn("system", text), Turn("user", "x")), "the system message")
        self.system = text or None

    def set(self, name: str, value: object) -> None:
        """Another value for a setting.

        Raises:
            InputError: There is no such setting, or it cannot have this value.
        """
        if name not in SETTINGS:
            near = did_you_mean(name, SETTINGS) or f"; there are {', '.join(SETTINGS)}"
            raise InputError(f"unknown setting {name}{near}")
        if isinstance(value, dict) or (isinstance(value, list) and name != "stop_strings"):
            raise InputError(f"{name} is {value!r}, expected a single value")
        draws = {"do_sample": (name, value) != ("temperature", 0)} if name in SAMPLING else {}
        self.settings = self.settings.with_(**{name: value}, **draws)

    def row(self) -> dict[str, list[dict[str, str]]]:
        """The conversation as a row of training data.

        Raises:
            InputError: Nothing has been said.
        """
        if not self.turns:
            raise InputError("nothing has been said yet; there is nothing to save")
        system = (Turn("system", self.system),) if self.system else ()
        return {"messages": [{"role": turn.role, "content": turn.content} for turn in (*system, *self.turns)]}

    def save(self, path: Path) -> str:
        """Writes the conversation: `.md` as text to read, `.json` as one object, any other name one more line.

        Returns:
            What was done.

        Raises:
            InputError: Nothing has been said, or the file is there already or cannot be written.
        """
        row = self.row()
        try:
            if path.suffix in (".md", ".json"):
                turns = "\n\n".join(f"**{turn['role']}**\n\n{turn['content']}" for turn in row["messages"])
                text = turns if path.suffix == ".md" else json.dumps(row, ensure_ascii=False, indent=2)
                with path.open("x", encoding="utf-8") as file:
                    file.write(text + "\n")
                return f"saved to {path}"
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            return f"added to {path} as one line"
        except FileExistsError as error:
            raise InputError(f"{path} exists already; give another name") from error
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror}); give another name") from error

    def _answer(self, write: Write, is_stopped: IsStopped) -> Answer:
        prompt = self._prompt(self.turns)
        lora = None if self.adapter is None else self.adapters[self.adapter]
        answer = stream_answer(
            self.model, self.tokenizer, prompt, write, lora=lora, settings=self._own_settings(), is_stopped=is_stopped
        )
        self._answers += 1
        return answer

    def _own_settings(self) -> GenerationConfig:
        """The settings with a seed for the next answer."""
        seed = self.settings.seed
        assert isinstance(seed, int)
        return self.settings.with_(seed=(derived_seed(seed, self._answers),))

    def _prompt(self, turns: list[Turn]) -> list[int]:
        """The tokens up to the answer; where they do not fit, the oldest turns are left out, and that is said."""
        room = self._room()
        system = (Turn("system", self.system),) if self.system else ()
        starts = [i for i in range(self.forgotten, len(turns)) if turns[i].role == "user"]
        for start in starts:
            prompt = chat_prompt(self.chat, (*system, *turns[start:]), "the message")
            if len(prompt) <= room:
                break
        check_prompt(prompt, "the message", self.model.config, self.settings, self.tokenizer)
        if start > self.forgotten:
            self.notice(
                f"the conversation has outgrown the model's {self.model.config.max_position_embeddings} positions; "
                f"its first {start} messages are left out from here on"
            )
            self.forgotten = start
        return prompt

    def _room(self) -> int:
        """How many tokens a prompt may have."""
        settings, positions = self.settings, self.model.config.max_position_embeddings
        if settings.max_new_tokens is None and settings.max_length is not None:
            return min(settings.max_length, positions) // 2  # half of what is for both
        return positions - settings.new_tokens(1, positions)

    def _last_message(self) -> int:
        """The index of the user's last message."""
        indices = [index for index, turn in enumerate(self.turns) if turn.role == "user"]
        if not indices:
            raise InputError("nothing has been said yet; write a message first")
        return indices[-1]


def check_name(name: str, taken: Container[str]) -> None:
    """Raises `InputError` for a name that an adapter cannot have."""
    check_text(name, "the adapter's name")
    if name in (BASE, NONE):
        raise InputError(f"an adapter cannot be called {name}, which is the model without one; give NAME=PATH")
    if name in taken:
        raise InputError(f"there is an adapter {name} already; give this one another name: NAME=PATH")
