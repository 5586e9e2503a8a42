"""A report's answers side by side, those that changed most first, with the words that differ marked."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from phi3_jax.report.parts import section, text

LISTED = 40  # answers of a group in the page; more would only make it slow
OPEN = 3  # answers of a group that are not folded away
COMPARED = 2000  # words of an answer that are compared

# Blanks; single ideographs and kana, which no blanks part; single punctuation marks; words.
_WORD = re.compile(r"\s+|[\u3040-\u30ff\u3400-\u9fff]|[!-/:-@\[-`{-~]|[^\s\u3040-\u30ff\u3400-\u9fff!-/:-@\[-`{-~]+")
_SPECIAL_TOKEN = re.compile(r"&lt;\|\w+\|&gt;")


@dataclass(frozen=True)
class Sample:
    """A question and what came of it. **Fields**: `right`, for each answer whether it is, None without a
    reference; `difference`, how far the first and the last answer are apart, from 0 to 1."""

    prompt: str
    reference: str
    answers: tuple[str, ...]
    right: tuple[bool, ...] | None
    difference: float

    @classmethod
    def of(cls, row: Mapping[str, Any], answers: Sequence[Any]) -> "Sample":
        reference = str(row.get("reference") or "")
        given = tuple(str(answer) for answer in answers)
        right: tuple[bool, ...] | None = None
        if row.get("right") is not None:
            right = tuple(map(bool, row["right"]))
        elif reference.strip():
            right = tuple(answer.strip() == reference.strip() for answer in given)
        return cls(str(row.get("prompt", "")), reference, given, right, difference(given[0], given[-1]))


def answers_section(heading: str, headings: Sequence[str], samples: Sequence[Sample]) -> str:
    """Cards in groups by what became right or wrong, within each the most changed first.

    `headings` name the answers of a sample, in order.
    """
    groups: dict[str, list[Sample]] = {name: [] for name in _names(len(headings))}
    for sample in samples:
        groups[_group(sample)].append(sample)
    filled = {name: group for name, group in groups.items() if group}
    counts = " · ".join(f"<b>{len(group):,}</b> {name}" for name, group in filled.items() if name)
    parts = [f'<p class="note">{counts}</p>' if counts else "", _legend(headings)]
    for name, group in filled.items():
        listed = sorted(group, key=lambda sample: -sample.difference)[:LISTED]
        cards = [_card(sample, headings) for sample in listed]
        parts.append(f'<h3 class="group">{name[0].upper()}{name[1:]}</h3>' if name else "")
        # Where nothing tells right from wrong there is one group, with room for more.
        shown = OPEN if name else 2 * OPEN
        parts.extend(cards[:shown])
        if rest := cards[shown:]:
            count = f"{len(rest)} more" + (f" of {len(group) - shown:,}" if len(listed) < len(group) else "")
            parts.append(f"<details>\n<summary>{count}</summary>\n{chr(10).join(rest)}\n</details>")
    return section(heading, "\n".join(part for part in parts if part) if filled else "")


def _legend(headings: Sequence[str]) -> str:
    if len(headings) < 2:
        return ""
    first, last = text(headings[0]), text(headings[-1])
    return (
        f'<p class="note">Marked: words <del>not in {last}</del>, <ins>not in {first}</ins>, '
        f"<mark>in the reference and not in {last}</mark>.</p>"
    )


def _names(answers: int) -> tuple[str, ...]:
    """The groups, in the order they are shown; the nameless one is for rows without a reference."""
    mixed = ("became right", "became wrong") if answers == 2 else ("right in some",)
    return (*mixed, "still wrong", "still right", "") if answers == 2 else (*mixed, "wrong", "right", "")


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


def _card(sample: Sample, headings: Sequence[str]) -> str:
    panes = []
    for index, heading in enumerate(headings):
        first, answer = sample.answers[0], sample.answers[index]
        if len(headings) == 1:
            shown = text(answer)
        elif index == 0:
            shown = marked(first, sample.answers[-1], "del")[0]
        else:
            shown = marked(first, answer, "ins")[1]
        panes.append(_pane(f"{text(heading)}{_badge(sample, index)}", shown))
    prompt = _SPECIAL_TOKEN.sub(r'<span class="quiet">\g<0></span>', text(sample.prompt))
    reference = ""
    if sample.reference.strip() not in ("", *(answer.strip() for answer in sample.answers)):
        missed = marked(sample.answers[-1], sample.reference, "mark")[1]
        reference = _pane("Reference", missed) + "\n"
    return f'<article>\n{_pane("Prompt", prompt)}\n<div class="pair">{"".join(panes)}</div>\n{reference}</article>'


def _pane(heading: str, content: str) -> str:
    return f'<div><h4>{heading}</h4><pre dir="auto">{content or "&nbsp;"}</pre></div>'


def _badge(sample: Sample, index: int) -> str:
    if sample.right is None:
        return ""
    if not sample.right[index]:
        return ' <b class="worse">✗ wrong</b>'
    is_same = sample.answers[index].strip() == sample.reference.strip()
    return f' <b class="better">✓ {"as the reference" if is_same else "right"}</b>'


def difference(a: str, b: str) -> float:
    """0 for equal texts, 1 for texts that share no word: 1 - difflib's ratio over the first words."""
    return 0.0 if a == b else 1 - SequenceMatcher(None, _words(a), _words(b)).ratio()


def marked(a: str, b: str, tag: str) -> tuple[str, str]:
    """Both texts, safe in HTML, with the words that the other does not have at that place within `tag`.

    Texts that share next to nothing stay unmarked: there every word would be.
    """
    first, second = _words(a), _words(b)
    # The heuristic for frequent words (autojunk) keeps answers that repeat themselves fast.
    matcher = SequenceMatcher(None, first, second)
    if a == b or matcher.ratio() < 0.1:
        return text(a), text(b)
    left: list[tuple[bool, str]] = []
    right: list[tuple[bool, str]] = []
    for kind, a1, a2, b1, b2 in matcher.get_opcodes():
        for side, part in ((left, first[a1:a2]), (right, second[b1:b2])):
            if part:
                side.append((kind != "equal", "".join(part)))
    rest = [whole[sum(len(part) for _, part in side) :] for whole, side in ((a, left), (b, right))]
    return _joined(left, tag) + text(rest[0]), _joined(right, tag) + text(rest[1])


def _words(answer: str) -> list[str]:
    return _WORD.findall(answer)[:COMPARED]


def _joined(parts: Sequence[tuple[bool, str]], tag: str) -> str:
    """Marks runs; a blank between two marked words is marked with them."""
    runs: list[tuple[bool, str]] = []
    for index, (changed, part) in enumerate(parts):
        between = 0 < index < len(parts) - 1 and part.isspace() and parts[index - 1][0] and parts[index + 1][0]
        if runs and runs[-1][0] == (changed or between):
            runs[-1] = (runs[-1][0], runs[-1][1] + part)
        else:
            runs.append((changed or between, part))
    return "".join(f"<{tag}>{text(part)}</{tag}>" if changed else text(part) for changed, part in runs)
