"""How to generate: the settings of transformers' `GenerationConfig` that are implemented, under their names."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

from phi3_jax.config.generation_names import asked_for, is_known
from phi3_jax.config.model import Phi3Config
from phi3_jax.config.names import did_you_mean
from phi3_jax.system.errors import InputError
from phi3_jax.system.numbers import is_number, is_whole
from phi3_jax.system.text import one_line

logger = logging.getLogger(__name__)

# What `generate` gives where nobody says how many.
_NEW_TOKENS = 20
# What float32 can divide logits by, and multiply them with.
_LEAST, _MOST = 1e-30, 1e30
# Settings of the draw: giving one of them means to draw.
SAMPLING = ("temperature", "top_k", "top_p", "min_p")
# Those that count something.
COUNTS = ("max_new_tokens", "max_length", "num_beams", "num_return_sequences")
# What belongs to the checkpoint and its tokenizer, and is not asked of the user.
OF_CHECKPOINT = ("eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class GenerationConfig:
    """What `generate` takes; transformers' names, meanings and defaults.

    Attributes:
        max_new_tokens: Longest answer in tokens, its end token counted; without it `max_length` counts, and where that
            is not given either 20.
        max_length: Longest prompt and answer together, where there is no max_new_tokens.
        max_time: Seconds after which no further token is begun.
        do_sample: Draw each token; otherwise the most likely one is taken.
        temperature: Below 1 the likely tokens become likelier; 0 is for the likeliest alone, without do_sample. Of
            temperature, top_k, top_p and min_p the distribution is made in this order.
        top_k: Draw from so many of the likeliest tokens; 0: from all.
        top_p: Draw from the likeliest tokens of this share together.
        min_p: Draw from tokens of at least this share of the likeliest one's.
        repetition_penalty: Divides the positive logits, and multiplies the negative ones, of tokens that are in
            the prompt or the answer already.
        num_beams: Beams of a beam search.
        length_penalty: Above 0 a beam search prefers longer answers.
        early_stopping: When a beam search is over: true, false or never.
        num_return_sequences: Answers to each prompt, side by side.
        seed: Of what is drawn; one for the batch, or one for each prompt, which then gets the same answer in any
            batch.
        eos_token_id: Tokens that end an answer.
        pad_token_id: What stands after it; None for the end token.
        stop_strings: Texts that end an answer once it contains one.

    Raises:
        InputError: A value is out of range, or two contradict each other.

    Example:
        >>> from phi3_jax import GenerationConfig
        >>> settings = GenerationConfig(max_new_tokens=64, do_sample=True, top_p=0.9)
        >>> settings.with_(temperature=0.7).temperature
        0.7
        >>> GenerationConfig(top_p=1.5)
        Traceback (most recent call last):
        phi3_jax.system.errors.InputError: top_p is 1.5, expected a number from 0 to 1
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    max_time: float | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    seed: int | tuple[int, ...] = 0
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("eos_token_id", "stop_strings", "seed"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if isinstance(self.eos_token_id, int):
            object.__setattr__(self, "eos_token_id", (self.eos_token_id,))
        if isinstance(self.stop_strings, str):
            object.__setattr__(self, "stop_strings", (self.stop_strings,))
        _check(self)

    @property
    def pad_id(self) -> int:
        """What stands after an answer's end."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return self.eos_token_id[0] if self.eos_token_id else 0

    @classmethod
    def from_model(cls, config: Phi3Config, **settings: Any) -> "GenerationConfig":
        """The checkpoint's own settings, and over them those that are given.

        Args:
            config: The checkpoint's, with its generation_config.json and config.json's token ids.
            **settings: Fields of this class; None means not given.

        Raises:
            InputError: A setting is unknown or out of range, or generation_config.json asks for what is not
                implemented.
        """
        file: dict[str, Any] = json.loads(config.generation)
        draws = bool((file | settings).get("do_sample"))
        given = {name: value for name, value in _known(settings, draws).items() if value is not None}
        _check_file(file, [f.name for f in fields(cls)], draws)
        own = {f.name: file[f.name] for f in fields(cls) if file.get(f.name) is not None}
        if "top_k" in file and file["top_k"] is None:
            own["top_k"] = 0
        own.setdefault("eos_token_id", config.end_token_ids)
        own.setdefault("pad_token_id", config.pad_token_id)
        if "max_length" in given and "max_new_tokens" in own:
            new = own["max_new_tokens"]
            _warn_once(f"max_length has no effect beside generation_config.json's max_new_tokens, {new}")
        try:
            chosen = cls(**(own | given))
        except InputError as error:
            name = str(error).partition(" ")[0]  # messages begin with the setting
            if name in file and name not in given:
                raise InputError(f"generation_config.json: {error}") from error
            raise
        _tell_of_sampling(chosen, given)
        return chosen

    def new_tokens(self, prompt: int, positions: int) -> int:
        """How many tokens an answer to a prompt has at most, of a model of so many positions.

        Args:
            prompt: The prompt's tokens.
            positions: The model's; where nobody has said how long an answer may be, it ends there.

        Raises:
            InputError: `max_length` leaves no room for an answer, or the model's positions do not.

        Example:
            >>> GenerationConfig(max_length=64).new_tokens(60, 4096), GenerationConfig().new_tokens(60, 4096)
            (4, 20)
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            return max(1, min(_NEW_TOKENS, positions - prompt))
        if prompt >= self.max_length:
            raise InputError(
                f"the prompt has {prompt} tokens, and max_length is {self.max_length}, which counts the prompt too; "
                "give max_new_tokens instead, or a higher max_length"
            )
        return max(1, min(self.max_length, positions) - prompt)

    def with_(self, **changes: Any) -> "GenerationConfig":
        """With other values for some fields.

        Raises:
            InputError: A field is unknown, or a value out of range.
        """
        return replace(self, **_known(changes, bool(changes.get("do_sample", self.do_sample))))


def _known(settings: Mapping[str, Any], draws: bool) -> dict[str, Any]:
    """The settings without those of transformers that change no answer; raises `InputError` for others' names."""
    names = [f.name for f in fields(GenerationConfig)]
    for name, value in asked_for(settings, draws=draws).items():
        said = value if isinstance(value, bool | int | float | str) else f"a {type(value).__name__}"
        raise InputError(f"{name} is {said}, a setting of transformers that is not implemented here; leave it out")
    for name in settings:
        if name in names:
            continue
        if not is_known(name):
            near = did_you_mean(name, names, "{!r}") or f"; there are {', '.join(names)}"
            raise InputError(f"unknown generation setting {name!r}{near}")
        logger.info("%s is passed over: it changes no answer", name)
    return {name: value for name, value in settings.items() if name in names}


def _check_file(file: Mapping[str, object], names: Sequence[str], draws: bool) -> None:
    for name, value in asked_for(file, draws=draws, in_a_file=True).items():
        raise InputError(f"generation_config.json sets {name} to {value!r}, which is not implemented; remove it")
    # Keys of anybody's, which transformers carries along; one that is misspelt is among them.
    unknown = [name for name in file if not (name in names or name.startswith("_") or is_known(name))]
    if unknown:
        _warn_once(f"generation_config.json: unknown and passed over: {', '.join(unknown)}")


def _tell_of_sampling(chosen: GenerationConfig, given: Mapping[str, object]) -> None:
    """What transformers says of settings of the draw that somebody gives where nothing is drawn."""
    default = GenerationConfig()
    idle = [name for name in SAMPLING if name in given and given[name] not in (getattr(default, name), 0)]
    if idle and not chosen.do_sample:
        _warn_once(f"{', '.join(idle)}: no effect without do_sample, the most likely tokens are taken")


@cache
def _warn_once(line: str) -> None:
    logger.warning("%s", one_line(line))


def _check(s: GenerationConfig) -> None:
    """Raises `InputError` for the first value out of range."""
    for name in COUNTS:
        value = getattr(s, name)
        if value is None and name in ("max_new_tokens", "max_length"):
            continue
        if not is_whole(value) or value < 1:
            raise InputError(f"{name} is {value!r}, expected a whole number of at least 1")
    if not is_whole(s.top_k) or s.top_k < 0:
        raise InputError(f"top_k is {s.top_k!r}, expected a whole number, 0 for no limit")
    # As in transformers a temperature of 0 says what do_sample: false says, and is no divisor.
    above = "a number above 0; for the most likely token set do_sample to false"
    for name, low, high, expected in (
        ("temperature", _LEAST if s.do_sample else -1, None, above if s.do_sample else "a number of at least 0"),
        ("top_p", -1, 1, "a number from 0 to 1"),
        ("repetition_penalty", 0, None, "a number above 0, 1 for none"),
        ("max_time", 0, None, "a number of seconds above 0"),
    ):
        value = getattr(s, name)
        if value is None and name == "max_time":
            continue
        if not is_number(value) or not low < value < _MOST or value < 0 or (high is not None and value > high):
            if name == "temperature" and is_number(value) and value < 0:
                expected = "a number of at least 0; 0 takes the most likely token"
            raise InputError(f"{name} is {value!r}, expected {expected}")
    if not is_number(s.min_p) or not 0 <= s.min_p <= 1:
        raise InputError(f"min_p is {s.min_p!r}, expected a number from 0 to 1")
    if not is_number(s.length_penalty) or not -10 <= s.length_penalty <= 10:
        raise InputError(f"length_penalty is {s.length_penalty!r}, expected a number from -10 to 10")
    if not isinstance(s.do_sample, bool):
        raise InputError(f"do_sample is {s.do_sample!r}, expected true or false")
    if not isinstance(s.early_stopping, bool) and s.early_stopping != "never":
        raise InputError(f"early_stopping is {s.early_stopping!r}, expected true, false or 'never'")
    if s.num_beams > 1 and s.num_return_sequences > s.num_beams:
        raise InputError(
            f"num_return_sequences is {s.num_return_sequences} and num_beams {s.num_beams}; "
            "a beam search returns at most as many answers as it has beams"
        )
    if s.num_beams == 1 and s.num_return_sequences > 1 and not s.do_sample:
        raise InputError(
            f"num_return_sequences is {s.num_return_sequences}, and without sampling or beams all answers "
            "would be the same; set do_sample to true or num_beams higher"
        )
    seeds = s.seed if isinstance(s.seed, tuple) else (s.seed,)
    if not all(is_whole(seed) and 0 <= seed < 2**32 for seed in seeds):
        raise InputError(f"seed is {s.seed!r}, expected a whole number from 0 to {2**32 - 1}, or one for each prompt")
    if not isinstance(s.eos_token_id, tuple) or not all(is_whole(token) for token in s.eos_token_id):
        raise InputError(f"eos_token_id is {s.eos_token_id!r}, expected token ids")
    if s.pad_token_id is not None and not (is_whole(s.pad_token_id) and s.pad_token_id >= 0):
        raise InputError(f"pad_token_id is {s.pad_token_id!r}, expected a token id, from 0 on")
    if not isinstance(s.stop_strings, tuple) or not all(isinstance(text, str) and text for text in s.stop_strings):
        raise InputError(f"stop_strings are {s.stop_strings!r}, expected texts that are not empty")
