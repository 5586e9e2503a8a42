"""What a chat template writes around an assistant's words, learnt from short conversations."""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import pairwise

from phi3_jax.data.control_tokens import ControlTokens


@dataclass(frozen=True)
class Markers:
    """What stands around an assistant's words.

    Attributes:
        opening: What opens a turn, as far as a prompt ends with it.
        end: What ends the last one.
        ends: All that end one, each the longest of its kind.
        inner: What may stand between the opening and the words.
    """

    opening: str
    end: str
    ends: tuple[str, ...] = ()
    inner: str = ""


def learn_markers(
    control: ControlTokens, once: Sequence[str], twice: Sequence[str] | None, closing: str, cue: str
) -> Markers:
    """Learns them from conversations of one and of two rounds, and from what cues an answer.

    Args:
        control: The tokenizer's control tokens.
        once: What is written before, between and behind a question and its answer.
        twice: The same of two rounds, None where the template refuses these.
        closing: What ends the answer where the conversation does, "" where no token does.
        cue: What stands behind a question where an answer is to follow, "" where the template knows no such thing.
    """
    end = closing.lstrip()
    ends = [closing] if end else []
    if twice and end:
        tokens = list(control.pattern.finditer(twice[2]))
        # What is left must open the next turn.
        if len(tokens) > 1 and not twice[2][: tokens[0].start()].strip():
            ends.append(twice[2][: tokens[0].end()])
        # A turn may end with more than one token: as many as the last one shares with the others.
        shared = common_start([twice[2], once[2]])
        several = list(control.pattern.finditer(shared))
        adjacent = [token.end() for token in several if not control.pattern.sub("", shared[: token.end()]).strip()]
        if adjacent:
            ends.append(shared[: adjacent[-1]])
            end = max(end, ends[-1].lstrip(), key=len)
    enders = {token for text in ends for token in control.pattern.findall(text)}
    openings = [once[1], *([twice[1], twice[3]] if twice else [])]
    openings = [_opening(control, text, enders) for text in openings]
    # Some templates write more before the last answer than before others, such as reasoning that is empty.
    whole = common_start(openings)
    cued = common_start([whole, _opening(control, cue, enders)])
    # Where a prompt ends earlier, the rest is the model's to say.
    opening = cued if control.pattern.search(cued) or (cued and not control.pattern.search(whole)) else whole
    return Markers(opening, end, tuple(dict.fromkeys(ends)), whole[len(opening) :])


def common_start(texts: Sequence[str]) -> str:
    """What all texts begin with.

    Example:
        >>> common_start(["<|end|><|user|>", "<|end|>"])
        '<|end|>'
    """
    first, last = min(texts), max(texts)  # all others lie between them
    return first[: next((i for i, letter in enumerate(first) if letter != last[i]), len(first))]


def _opening(control: ControlTokens, literal: str, closing: Container[str]) -> str:
    """What opens an answer in what stands before its words: less what ends the turn before, less empty reasoning."""
    text = literal.lstrip()
    while (token := control.pattern.match(text)) and token.group() in closing:
        text = text[token.end() :].lstrip()
    pair = _pair(control, text)
    return text[: pair[0]] if pair else text


def _pair(control: ControlTokens, text: str) -> tuple[int, int] | None:
    """Where two tokens of which one closes the other, such as <think> and </think>, stand with nothing in between."""
    tokens = list(control.pattern.finditer(text))
    for opened, closed in pairwise(tokens):
        is_pair = closed.group() != opened.group() and closed.group().replace("/", "", 1) == opened.group()
        if is_pair and not text[opened.end() : closed.start()].strip():
            return opened.start(), closed.end()
    return None


def without_pairs(control: ControlTokens, text: str) -> str:
    """A text without pairs of tokens that hold nothing, such as an empty reasoning."""
    while pair := _pair(control, text):
        text = text[: pair[0]] + text[pair[1] :]
    return text
