"""What stages find, written down as they find it: a line each, of which the whole is made after every stage."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from phi3_jax.system.files import write_text

Status = Literal["done", "wrong", "failed", "out of time", "left out"]
JSON_FILE, TABLE_FILE = "check.json", "check.md"


@dataclass(frozen=True)
class Finding:
    """One thing that was checked or measured.

    Attributes:
        name: What.
        value: The error or the figure; None where there is none.
        unit: Of the figure.
        limit: What an error may be at most; None of a figure that is only told.
        note: What else there is to say.
    """

    name: str
    value: float | None = None
    unit: str = ""
    limit: float | None = None
    note: str = ""

    @property
    def is_right(self) -> bool:
        """Whether it is within its limit; what has none is."""
        # Written so that NaN, which compares false with everything, is wrong.
        return self.limit is None or (self.value is not None and self.value <= self.limit)


@dataclass
class Recorder:
    """Takes what a stage finds, and writes each line at once.

    Attributes:
        file: Where to.
        findings: What was found so far.
    """

    file: Path
    findings: list[Finding] = field(default_factory=list)

    def add(self, finding: Finding) -> None:
        self.findings.append(finding)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_plain(asdict(finding))) + "\n")

    def error(self, name: str, value: float, limit: float, note: str = "") -> None:
        """An error that may be `limit` at most."""
        self.add(Finding(name, value, "", limit, note))

    def figure(self, name: str, value: float | None, unit: str, note: str = "") -> None:
        """A figure; None says that it is not known here."""
        self.add(Finding(name, value, unit, None, note))

    def note(self, name: str, note: str) -> None:
        """Something that is said, such as what was left out and why."""
        self.add(Finding(name, note=note))


def read_findings(file: Path) -> list[Finding]:
    """What a stage wrote, which may have been cut off within a line."""
    if not file.is_file():
        return []
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            raw = json.loads(line)
        except json.JSONDecodeError:
            continue
        value = float(raw["value"]) if isinstance(raw["value"], str) else raw["value"]
        found.append(Finding(**{**raw, "value": value}))
    return found


@dataclass(frozen=True)
class StageResult:
    """How a stage went.

    Attributes:
        name: Its name.
        status: How it ended.
        seconds: That it took.
        findings: What it found.
        reason: In words, where it is not done.
    """

    name: str
    status: Status
    seconds: float
    findings: Sequence[Finding]
    reason: str = ""

    @property
    def is_right(self) -> bool:
        return self.status in ("done", "left out")


def write_results(folder: Path, about: Mapping[str, object], results: Iterable[StageResult]) -> None:
    """Writes the JSON and the table of all stages so far.

    Args:
        folder: Where to.
        about: The command and the like.
        results: Of the stages that are over.
    """
    results = list(results)
    stages = [
        {
            "name": result.name,
            "status": result.status,
            "seconds": round(result.seconds, 1),
            "reason": result.reason,
            "findings": [{**_plain(asdict(one)), "right": one.is_right} for one in result.findings],
        }
        for result in results
    ]
    right = all(result.is_right for result in results)
    write_text(folder / JSON_FILE, json.dumps({**about, "right": right, "stages": stages}, indent=1) + "\n")
    write_text(folder / TABLE_FILE, table(results))


def table(results: Iterable[StageResult]) -> str:
    """The results as a table of Markdown."""
    lines = ["| stage | what | value | at most | |", "|---|---|---|---|---|"]
    for result in results:
        reason = f": {result.reason}" if result.reason else ""
        lines.append(f"| **{result.name}** | {result.status}{_cell(reason)} | {result.seconds:.0f} s | | |")
        for one in result.findings:
            absent = "unknown" if one.unit else ""
            value = absent if one.value is None else f"{_number(one.value)} {one.unit}".strip()
            limit = "" if one.limit is None else _number(one.limit)
            verdict = "" if one.limit is None else "right" if one.is_right else "**wrong**"
            note = f" ({one.note})" if one.note else ""
            lines.append(f"| | {_cell(one.name + note)} | {value} | {limit} | {verdict} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _number(value: float) -> str:
    if value and abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _plain(finding: dict[str, Any]) -> dict[str, Any]:
    """Without numbers that JSON has no word for."""
    value = finding["value"]
    return {**finding, "value": value if value is None or math.isfinite(value) else str(value)}
