"""Every assistant turn as a row of its own."""

import json

import pytest

from phi3_jax import InputError
from phi3_jax.config.sections import DataSection
from phi3_jax.data import prepare_data
from phi3_jax.evaluate.turns import every_turn
from tests.helpers.tokenizers import tiny_tokenizer

TURNS = [("user", "ab"), ("assistant", "cd"), ("user", "e"), ("assistant", "fg"), ("user", "h"), ("assistant", "ij")]


def prepared(folder, *conversations, max_length):
    lines = [{"messages": [{"role": role, "content": content} for role, content in turns]} for turns in conversations]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = DataSection(train=str(folder / "rows.jsonl"), max_length=max_length, cache=False)
    return prepare_data(data, tiny_tokenizer(), seed=0).train


def test_each_row_ends_with_its_turn_and_trains_nothing_else(tmp_path):
    tokenizer = tiny_tokenizer()
    rows = every_turn(prepared(tmp_path, TURNS[:2], TURNS, max_length=64), tokenizer, 64)
    assert rows.references == ["cd", "cd", "fg", "ij"]
    assert [rows.where(row) for row in range(4)] == [f"{tmp_path}/rows.jsonl, row {row}" for row in (1, 2, 2, 2)]
    for row, (ids, mask) in enumerate(rows):
        start = rows.prompt_lengths[row]
        assert tokenizer.decode(ids[:start]).endswith("<|assistant|>")
        assert tokenizer.decode(ids[start:]) == f"{rows.references[row]}<|end|>"
        assert mask.tolist() == [0] * start + [1] * 3
    assert (rows.stats.rows, rows.stats.tokens, rows.stats.target_tokens) == (4, len(rows.input_ids), 12)


@pytest.mark.parametrize("length", range(6, 22))
def test_a_turn_that_was_cut_is_left_out_unless_its_text_is_known(length, tmp_path):
    conversation = prepared(tmp_path, TURNS, max_length=length)
    # <|user|>ab<|end|><|assistant|>cd<|end|> are 8 tokens, the other turns begin at 12 and 19.
    wholes = [text for text, end in (("cd", 8), ("fg", 15)) if end < length]
    expected = wholes + (["ij"] if length > 19 else [])
    if not expected:
        with pytest.raises(InputError, match=f"every assistant turn is cut at data.max_length {length}"):
            every_turn(conversation, tiny_tokenizer(), length)
        return
    assert every_turn(conversation, tiny_tokenizer(), length).references == expected
