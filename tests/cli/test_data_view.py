"""How sets of rows are shown in a terminal."""

import numpy as np
import pytest

from phi3_jax.cli.data_view import BARS, WIDTH, DataView, bar, facts, folded, histogram
from phi3_jax.config.sections import DataSection
from phi3_jax.data.rows import DataStats, length_histogram
from tests.helpers.rows import make_rows
from tests.helpers.tokenizers import tiny_tokenizer


def test_a_histogram_has_a_bar_for_every_row_and_few_lines():
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 5000, 1000).tolist()
    stats = DataStats(lengths=length_histogram(lengths, 4096), truncated=sum(n > 4096 for n in lengths))
    lines = histogram(stats, 4096)
    assert 5 < len(lines) <= BARS + 1
    counts = [int(line.split()[-1].replace(",", "")) for line in lines]
    assert sum(counts) == 1000
    assert lines[-1].split()[:2] == ["over", "4,096"]
    assert counts[-1] == stats.truncated
    assert len({line.index("█") for line in lines}) == 1
    longest = lines[int(np.argmax(counts))]
    assert longest.count("█") == WIDTH == max(line.count("█") for line in lines)


def test_a_histogram_of_nothing_is_nothing():
    assert histogram(DataStats(), 8) == []
    assert histogram(DataStats(lengths={"edges": [], "counts": []}, truncated=2), 8)[0].endswith(" 2")


@pytest.mark.parametrize("bins", [1, 11, 12, 13, 30, 31])
def test_folding_keeps_every_count_in_bins_of_equal_width(bins):
    counts = list(range(1, bins + 1))
    edges, sums = folded([7 + 3 * i for i in range(bins + 1)], counts)
    assert len(sums) <= BARS
    assert sum(sums) == sum(counts)
    assert edges[0] == 7
    assert edges[-1] >= 7 + 3 * bins
    assert len(set(np.diff(edges))) == 1


def test_bars_are_in_proportion_and_what_is_there_shows():
    assert [bar(n, 80, width=10) for n in (80, 40, 4, 1, 0)] == ["█" * 10, "█" * 5, "▌", "▏", ""]
    assert bar(0, 0) == ""


def test_only_what_there_is_to_say_is_said():
    stats = DataStats(sources=["x"], rows=2, tokens=8, target_tokens=6)
    said = dict(facts(stats, DataSection(train="x", packing=False), 4))
    assert said.keys() == {"rows", "tokens", "steps"}
    assert "75.0%" in said["tokens"]
    assert said["steps"] == "1 an epoch, of 4 rows"


def test_packed_rows_have_the_steps_of_their_sequences():
    stats = DataStats(sources=["x"], rows=900, tokens=1500, packing_efficiency=0.5)
    said = dict(facts(stats, DataSection(train="x", max_length=100), 4))
    assert "30 sequences of 100" in said["positions"]
    assert said["steps"] == "8 an epoch, of 4 sequences"
    assert "steps" not in dict(facts(stats, DataSection(train="x", max_length=100)))
    # Of 30 the last 2 are left out where a batch has 4.
    for step_rows, multiple, steps in ((4, 4, 7), (8, 4, 4), (8, 1, 4)):
        said = dict(facts(stats, DataSection(train="x", max_length=100), step_rows, multiple))
        assert said["steps"].startswith(f"{steps} an epoch")


@pytest.mark.parametrize(("sources", "prefix"), [(["x"], ""), (["x", "y"], "x, ")])
def test_rows_that_were_cut_or_left_out_are_named(sources, prefix):
    names = [f"x, row {number}" for number in range(1, 31)]
    stats = DataStats(sources=sources, formats={"messages": 7}, truncated=1200, truncated_rows=names)
    stats.skipped, stats.invalid, stats.left_out = 2, 1, [[name, "has no assistant turn"] for name in names[:3]]
    stats.left_out[2] = [names[2], "turn 2: has no content"]
    lines = facts(stats, DataSection(train="x"))
    (cut,) = [text for heading, text in lines if heading == "cut"]
    assert cut.startswith(f"1,200 rows at 2,048 tokens: {prefix}row 1, {prefix}row 2, ")
    assert cut.endswith(f"{prefix}row 10, and 1,190 more")
    start = lines.index(("left out", f"{prefix}row 1: has no assistant turn"))
    assert lines[start + 1 :] == [
        ("", f"{prefix}row 2: has no assistant turn"),
        ("", f"{prefix}row 3, turn 2: has no content"),
    ]
    assert lines[0][1].endswith(", format messages")


@pytest.mark.parametrize(("variables", "is_coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_on_a_terminal_targets_are_coloured(variables, is_coloured, monkeypatch, capsys):
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color", **variables}.items():
        monkeypatch.setenv(name, value)
    tokenizer = tiny_tokenizer()
    rows = make_rows([4])
    rows.input_ids[:] = tokenizer.encode("ab<|end|>c", add_special_tokens=False)
    DataView(tokenizer, DataSection(train="x")).print("x", rows, show=1)
    printed = capsys.readouterr().out
    assert ("\x1b[1;32mb<|end|>c" in printed) == is_coloured
    assert ("a⟦b<|end|>c⟧" in printed) != is_coloured
