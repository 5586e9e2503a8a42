"""What every part of a report is made of: safe text, numbers, tables, sections, and the page around them."""

import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from phi3_jax.report.style import STYLE
from phi3_jax.system.files import write_text
from phi3_jax.system.secrets import redact

# Characters that reorder or hide text, or that HTML forbids: controls (line breaks and tabs are
# fine), lone surrogates, marks of bidirectional text, separators, zero widths, tags.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)


def text(value: Any) -> str:
    """Safe in HTML's text and attributes; what is invisible, or moves what is visible, as an escape."""
    return _INVISIBLE.sub(_code, escape(str(value)))


def _code(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


def words(name: str) -> str:
    return str(name).replace("_", " ")


def last_name(path: str) -> str:
    return path.rstrip("/\\").replace("\\", "/").split("/")[-1] or path


def value_text(value: Any) -> str:
    """A plain value as it is read in a table."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(value_text, value))
    return str(value)


def bytes_text(count: float) -> str:
    """ "3.46 GiB" """
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"


def seconds_text(seconds: float) -> str:
    """ "12.3 s", "4 min 05 s", "3 h 07 min" """
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def section(heading: str, content: str) -> str:
    """A card under a heading; nothing where it would be empty."""
    return f"<section>\n<h2>{heading}</h2>\n{content}\n</section>" if content else ""


def table(rows: Iterable[tuple[Any, Any]]) -> str:
    """Names and values."""
    body = "\n".join(
        f'<tr><th scope="row">{text(name)}</th><td>{text(value_text(value))}</td></tr>' for name, value in rows
    )
    return f"<table>\n{body}\n</table>" if body else ""


def columns_table(columns: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], label: str) -> str:
    """Named rows of cells, which are HTML, under named columns; scrolls within itself where it is wide."""
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in columns)
    body = "\n".join(
        f'<tr><th scope="row">{text(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for name, cells in rows
    )
    if not body:
        return ""
    return (
        f'<div class="scroll" role="region" aria-label="{text(label)}" tabindex="0">\n<table>\n'
        f"<thead><tr><td></td>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def write_page(path: str | Path, *, title: str, kind: str, introduction: str, sections: Iterable[str]) -> None:
    """Writes a page that loads nothing, whole or not at all; `introduction` and `sections` are HTML.

    Tokens are left out, see `phi3_jax.system.secrets`.
    """
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<p class="kind">{text(kind)}</p>
<h1>{text(title)}</h1>
{introduction}
</header>
{chr(10).join(part for part in sections if part)}
</main>
</body>
</html>
"""
    write_text(Path(path), redact(page))
