"""A report's answers side by side, those that changed most first, with the words that differ marked."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

LISTED = 40  # answers of a group in the page; more would only make it slow
OPEN = 3  # answers of a group that are not folded away
COMPARED = 2000  # words of an answer that are compared

# Blanks; single ideographs and kana, which no blanks part; single punctuation marks; words.
_WORD = re.compile(r"\s+|[\u3040-\u30ff\u3400-\u9fff]|[!-/:-@\[-`{-~]|[^\s\u3040-\u30ff\u3400-\u9fff!-/:-@\[-`{-~]+")
_SPECIAL_TOKEN = re.compile(r"(<\|\w+\|>)")

Runs = list[tuple[bool, str]]  # parts of a text, and whether they stand out


@dataclass(frozen=True)
class Sample:
    """A question and what came of it.

    Attributes:
        prompt: What was asked.
        reference: The right answer, where the data has one.
        answers: One of each model.
        right: For each answer whether it is right, None without a reference.
        difference: How far the first and the last answer are apart, from 0 to 1.
    """

    prompt: str
    reference: str
    answers: tuple[str, ...]
    right: tuple[bool, ...] | None
    difference: float

    @classmethod
    def of(cls, row: Mapping[str, object], answers: Sequence[object]) -> "Sample":
        """A row's sample: its `prompt`, its `reference`, and `right` where it says what is."""
        reference = str(row.get("reference") or "")
        given = tuple(str(answer) for answer in answers)
        right: tuple[bool, ...] | None = None
        if isinstance(said := row.get("right"), Sequence):
            right = tuple(map(bool, said))
        elif reference.strip():
            right = tuple(answer.strip() == reference.strip() for answer in given)
        return cls(str(row.get("prompt", "")), reference, given, right, difference(given[0], given[-1]))


@dataclass(frozen=True)
class Pane:
    """One model's answer: its words, and the HTML tag of those that stand out."""

    heading: str
    runs: Runs
    tag: str
    right: bool | None
    is_reference: bool


@dataclass(frozen=True)
class Card:
    """A sample as it is shown: its special tokens set apart, and what the last answer lacks of the reference."""

    prompt: Runs
    answers: list[Pane]
    missed: Runs


@dataclass(frozen=True)
class Group:
    """Cards of one outcome.

    Attributes:
        name: The outcome, empty for samples without a reference.
        open: The cards that are seen at once.
        folded: Those that a click shows.
        of: " of 47", where not all others are in the page.
    """

    name: str
    open: list[Card]
    folded: list[Card]
    of: str


@dataclass(frozen=True)
class Answers:
    """What the page shows of all samples: how many came out in which way, and the groups of cards."""

    headings: Sequence[str]
    counts: list[tuple[str, str]]
    groups: list[Group]


def grouped(headings: Sequence[str], samples: Sequence[Sample]) -> Answers:
    """Cards in groups by what became right or wrong, within each the most changed first.

    Args:
        headings: Names of the answers of a sample, in order.
        samples: The questions, in any order.
    """
    groups: dict[str, list[Sample]] = {name: [] for name in _names(len(headings))}
    for sample in samples:
        groups[_group(sample)].append(sample)
    filled = {name: group for name, group in groups.items() if group}
    shown = []
    for name, group in filled.items():
        cards = [_card(s, headings) for s in sorted(group, key=lambda sample: -sample.difference)[:LISTED]]
        # Where nothing tells right from wrong there is one group, with room for more.
        seen = OPEN if name else 2 * OPEN
        of = f" of {len(group) - seen:,}" if len(cards) < len(group) else ""
        shown.append(Group(name, cards[:seen], cards[seen:], of))
    return Answers(headings, [(f"{len(group):,}", name) for name, group in filled.items() if name], shown)


def _names(answers: int) -> tuple[str, ...]:
    """The groups, in the order they are shown; the nameless one is for rows without a reference."""
    if answers == 2:
        return "became right", "became wrong", "still wrong", "still right", ""
    return "right in some", "wrong", "right", ""


def _group(sample: Sample) -> str:
    if sample.right is None:
        return ""
    still = "still " if len(sample.right) == 2 else ""
    if all(sample.right):
        return f"{still}right"
    if not any(sample.right):
        return f"{still}wrong"
    if len(sample.right) > 2:
        return "right in some"
    return "became right" if sample.right[1] else "became wrong"


def _card(sample: Sample, headings: Sequence[str]) -> Card:
    first, last = sample.answers[0], sample.answers[-1]
    reference = sample.reference.strip()
    panes = []
    for index, (heading, answer) in enumerate(zip(headings, sample.answers, strict=True)):
        runs = compared(first, answer)[1] if index else compared(first, last)[0]
        right = None if sample.right is None else sample.right[index]
        panes.append(Pane(heading, runs, "ins" if index else "del", right, answer.strip() == reference))
    prompt = [(index % 2 == 1, part) for index, part in enumerate(_SPECIAL_TOKEN.split(sample.prompt)) if part]
    is_shown = reference not in ("", *(answer.strip() for answer in sample.answers))
    return Card(prompt, panes, compared(last, sample.reference)[1] if is_shown else [])


def difference(a: str, b: str) -> float:
    """How far two texts are apart: 1 - difflib's ratio over their first words.

    Example:
        >>> difference("a red mug", "a red mug"), difference("yes", "no")
        (0.0, 1.0)
    """
    return 0.0 if a == b else 1 - SequenceMatcher(None, _words(a), _words(b)).ratio()


def compared(a: str, b: str) -> tuple[Runs, Runs]:
    """Both texts in parts, of which those stand out that the other does not have at that place.

    In texts that share next to nothing, nothing does: there every word would.

    Example:
        >>> compared("a red mug", "a blue mug")[0]
        [(False, 'a '), (True, 'red'), (False, ' mug')]
    """
    first, second = _words(a), _words(b)
    # The heuristic for frequent words (autojunk) keeps answers that repeat themselves fast.
    matcher = SequenceMatcher(None, first, second)
    if a == b or matcher.ratio() < 0.1:
        return [(False, a)] if a else [], [(False, b)] if b else []
    left: Runs = []
    right: Runs = []
    for kind, a1, a2, b1, b2 in matcher.get_opcodes():
        for side, part in ((left, first[a1:a2]), (right, second[b1:b2])):
            if part:
                side.append((kind != "equal", "".join(part)))
    for whole, side in ((a, left), (b, right)):
        if rest := whole[sum(len(part) for _, part in side) :]:
            side.append((False, rest))
    return _joined(left), _joined(right)


def _words(answer: str) -> list[str]:
    return _WORD.findall(answer)[:COMPARED]


def _joined(parts: Runs) -> Runs:
    """Neighbours that both stand out or both do not, as one; a blank between two that do stands out with them."""
    runs: Runs = []
    for index, (changed, part) in enumerate(parts):
        between = 0 < index < len(parts) - 1 and part.isspace() and parts[index - 1][0] and parts[index + 1][0]
        if runs and runs[-1][0] == (changed or between):
            runs[-1] = (runs[-1][0], runs[-1][1] + part)
        else:
            runs.append((changed or between, part))
    return runs
