"""How `phi3-jax data` shows sets of rows in a terminal, or where its output goes instead."""

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from phi3_jax.config.sections import DataSection
from phi3_jax.data.preview import mark, runs
from phi3_jax.data.rows import DataStats, TokenizedRows
from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.system.text import counted, printable

BARS = 12  # lines of the histogram, at most
WIDTH = 40  # columns of its longest bar
HEADING = 12  # columns of the headings
NAMED = 10  # rows that are named one by one
SHOWN = 300  # tokens of a stretch of targets, or of what is between them
_EIGHTHS = ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")


class DataView:
    """Prints sets of rows.

    Args:
        tokenizer: That of the rows.
        data: How they were read.
    """

    def __init__(self, tokenizer: Tokenizer, data: DataSection) -> None:
        self._tokenizer, self._data = tokenizer, data
        # Lines as they are, whatever brackets are in them, and not cut where nobody's terminal is that narrow.
        self._console = Console(highlight=False, markup=False, soft_wrap=True)

    def print(
        self, name: str, rows: TokenizedRows, *, show: int, step_rows: int | None = None, multiple: int = 1
    ) -> None:
        """Prints what there is to say of a set of rows, and its first rows.

        Args:
            name: What the set is called.
            rows: Its rows.
            show: How many of them are printed.
            step_rows: Sequences of a training step; None where the set is not trained on.
            multiple: Sequences at the end of an epoch that are not so many are left out.
        """
        self._line(name, style="bold")
        for heading, text in facts(rows.stats, self._data, step_rows, multiple):
            self._line(f"  {heading:<{HEADING}}{text}")
        for line in histogram(rows.stats, self._data.max_length):
            self._line(f"  {'':<{HEADING}}{line}")
        for notice in rows.stats.notices:
            self.note(notice)
        for index in range(min(show, len(rows))):
            self._row(rows, index)
        self._line()

    def note(self, text: str) -> None:
        """Prints a line that the user should see."""
        self._line(f"  note: {text}", style="yellow")

    def _row(self, rows: TokenizedRows, index: int) -> None:
        ids, mask = rows[index]
        self._line(f"\n  {rows.where(index)}: {len(ids):,} tokens, {int(mask.sum()):,} targets", style="bold")
        parts = runs(rows, self._tokenizer, index, tokens=SHOWN)
        if self._console.color_system is None or self._console.no_color:
            self._line(mark(parts))
            return
        text = Text()
        for is_target, part in parts:
            text.append(part, style="bold green" if is_target else "dim")
        self._console.print(text)

    def _line(self, text: str = "", style: str = "") -> None:
        if self._console.is_terminal:
            self._console.print(printable(text), style=style)
        else:  # rich would end the process by itself where nobody reads any more
            print(printable(text))


def facts(
    stats: DataStats, data: DataSection, step_rows: int | None = None, multiple: int = 1
) -> list[tuple[str, str]]:
    """What there is to say of a set in lines: a heading, "" where it is that of the line before, and the text.

    Args:
        stats: Of the rows.
        data: How they were read.
        step_rows: Sequences of a training step; None where they are not trained on, or that is not known.
        multiple: Sequences at the end of an epoch that are not so many are left out.
    """
    share = stats.target_tokens / max(stats.tokens, 1)
    format_of = f", format {next(iter(stats.formats))}" if len(stats.formats) == 1 else ""
    found = [("rows", f"{stats.rows:,}{format_of}")]
    if len(stats.sources) > 1:
        found += [("" if number else "files", name) for number, name in enumerate(few(stats.sources))]
    found.append(("tokens", f"{stats.tokens:,}, {share:.1%} of them targets (data.loss_on: {data.loss_on})"))
    if figures := stats.length_figures:
        text = "shortest {min:,}, median {median:,}, 95 of 100 up to {p95:,}, longest {max:,} tokens"
        found.append(("lengths", text.format(**figures)))
    sequences = stats.rows
    if stats.packing_efficiency is not None:
        sequences = round(stats.tokens / (stats.packing_efficiency * data.limit))
        used = f"{stats.packing_efficiency:.1%} used"
        found.append(("positions", f"{used}, rows packed into {counted(sequences, 'sequence')} of {data.limit:,}"))
    if step_rows is not None:
        what = "row" if stats.packing_efficiency is None else "sequence"
        taken = sequences // multiple * multiple
        found.append(("steps", f"{-(-taken // step_rows):,} an epoch, of {counted(step_rows, what)}"))
    if stats.truncated:
        cut = ", ".join(few([name_in(where, stats.sources) for where in stats.truncated_rows], stats.truncated))
        found.append(("cut", f"{counted(stats.truncated, 'row')} at {data.limit:,} tokens: {cut}"))
    left_out = [
        f"{name_in(where, stats.sources)}{',' if why.startswith('turn ') else ':'} {why}"
        for where, why in stats.left_out
    ]
    for number, line in enumerate(few(left_out, stats.skipped + stats.invalid)):
        found.append(("" if number else "left out", line))
    return found


def few(names: Sequence[str], count: int | None = None) -> list[str]:
    """The first ten of `count` names, and how many more there are.

    Example:
        >>> few(["row 3", "row 5"], 1200)
        ['row 3', 'row 5', 'and 1,198 more']
    """
    shown = list(names[:NAMED])
    more = (len(names) if count is None else count) - len(shown)
    return [*shown, f"and {more:,} more"] if more > 0 else shown


def name_in(where: str, sources: Sequence[str]) -> str:
    """A row's name without that of its file, where there is one file only."""
    return where.removeprefix(f"{sources[0]}, ") if len(sources) == 1 else where


def histogram(stats: DataStats, max_length: int | None) -> list[str]:
    """Lines with a bar for the rows of each range of lengths, and one for those that were cut."""
    lengths = stats.lengths or {"edges": [], "counts": []}
    edges, counts = folded(lengths["edges"], lengths["counts"])
    bars = [(_range(low, high - 1), count) for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)]
    if stats.truncated and max_length is not None:
        bars.append((f"over {max_length:,}", stats.truncated))
    most = max((count for _, count in bars), default=0)
    wide = max((len(label) for label, _ in bars), default=0)
    return [f"{label:>{wide}} {bar(count, most):<{WIDTH}} {count:,}" for label, count in bars]


def _range(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def folded(edges: Sequence[int], counts: Sequence[int], most: int = BARS) -> tuple[list[int], list[int]]:
    """A histogram of at most so many bins of equal width, each of several of the given ones.

    Example:
        >>> folded([0, 5, 10, 15], [2, 0, 1], most=2)
        ([0, 10, 20], [2, 1])
    """
    together = -(-len(counts) // most)
    if together < 2:
        return list(edges), list(counts)
    sums = [sum(counts[start : start + together]) for start in range(0, len(counts), together)]
    width = (edges[1] - edges[0]) * together
    return [edges[0] + width * index for index in range(len(sums) + 1)], sums


def bar(count: int, most: int, width: int = WIDTH) -> str:
    """A bar of block characters that says how much `count` is, where `most` has all of the width.

    What is more than nothing shows, with an eighth of a column at least.

    Example:
        >>> bar(3, 4, width=4), bar(1, 1000, width=4), bar(0, 4)
        ('███', '▏', '')
    """
    eighths = -(-count * 8 * width // most) if most else 0
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8]
