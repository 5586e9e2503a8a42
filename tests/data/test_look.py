"""What is seen of a file of rows before there is a run."""

import json

import pytest

from phi3_jax.config.sections import DataSection
from phi3_jax.data.look import MOST_ROWS, look_at
from phi3_jax.demo import demo_path
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.system.errors import InputError


@pytest.fixture(scope="module")
def tokenizer():
    return Checkpoint.open(demo_path("base")).tokenizer


def section(path, answers):
    lines = [json.dumps({"prompt": "Say it.", "completion": answer}) for answer in answers]
    path.write_text("\n".join(lines))
    return DataSection(train=str(path), max_length=16)


def test_rows_are_counted_and_their_lengths_are_whole(tmp_path, tokenizer):
    long = "word " * 5000  # nothing is cut
    seen = look_at(section(tmp_path / "rows.jsonl", ["yes", "no, not yet", long]), tokenizer)
    assert (seen.rows, seen.columns, seen.stats.formats) == (3, ["prompt", "completion"], {"prompt_completion": 3})
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in ("yes", "no, not yet", long)]
    assert seen.targets.tolist() == [len(answer) + 1 for answer in ids]  # and the token that ends it
    assert set((seen.lengths - seen.targets).tolist()) == {seen.lengths[0] - seen.targets[0]}
    assert seen.tokens == seen.lengths.sum()


def test_of_many_rows_some_from_everywhere_are_looked_at(tmp_path, tokenizer):
    count = MOST_ROWS + 500
    seen = look_at(section(tmp_path / "rows.jsonl", ["a"] * (count - 1) + ["word " * 50]), tokenizer)
    assert seen.rows == count
    assert len(seen.lengths) == MOST_ROWS
    assert seen.tokens == pytest.approx(seen.lengths.mean() * count)  # of all rows
    assert seen.lengths.argmax() == MOST_ROWS - 1  # the last one is among them


def test_a_row_that_is_wrong_is_named(tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": 3}]}')
    with pytest.raises(InputError, match=r"rows\.jsonl, row 1"):
        look_at(DataSection(train=str(tmp_path / "rows.jsonl")), tokenizer)
