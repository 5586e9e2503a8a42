"""What becomes of rows one after the other, and of those with nothing to train on."""

import dataclasses

import numpy as np
import pytest

from phi3_jax.data import prepare_data
from phi3_jax.data.chat import ChatTokenizer
from phi3_jax.system.errors import InputError
from tests.helpers.tokenizers import JULY, phi3_tokenizer
from tests.helpers.tool_templates import MARKED_LAST

PAIR = [{"role": "user", "content": "the hen"}, {"role": "assistant", "content": "12"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": PAIR[:1]}, "row 2: has no assistant turn"),
        ({"messages": []}, "row 2: has no turns"),
        ({"messages": [PAIR[0], {"role": "assistant", "content": " "}]}, "row 2: its assistant turns are blank"),
        ({"messages": [PAIR[0], {**PAIR[1], "weight": 0}]}, "row 2: every assistant turn has loss weight 0"),
        ({"messages": [{"role": "user", "content": "x" * 99}, PAIR[1]]}, "row 2: all its targets lie beyond"),
        ({"prompt": "u", "completion": None}, "row 2: its assistant turns are blank"),
        ({"text": " "}, "row 2: its text is blank"),
        ({"text": "plain"}, r"row 2: no assistant turn .*<\|assistant\|> ... <\|end\|>.* data.loss_on: all"),
    ],
)  # fmt: skip
def test_rows_with_nothing_to_train_on(chats, row, message):
    data = chats({"messages": PAIR}, row, {"messages": PAIR})
    with pytest.raises(InputError, match=f"chats.jsonl, {message}.*skip_empty") as caught:
        prepare_data(data, phi3_tokenizer(JULY), seed=0)
    assert "\n" not in str(caught.value)
    prepared = prepare_data(dataclasses.replace(data, skip_empty=True), phi3_tokenizer(JULY), seed=0)
    assert (len(prepared.train), prepared.train.stats.skipped) == (2, 1)
    with pytest.raises(InputError, match="no usable rows; all 1 have nothing to train on"):
        prepare_data(chats(row, skip_empty=True), phi3_tokenizer(JULY), seed=0)


def test_completion_is_that_of_rows_that_have_one_and_all_of_others(chats):
    """TRL's meaning, where a script says neither completion_only_loss nor assistant_only_loss."""
    asked, answered = [PAIR[0], PAIR[1], PAIR[0]], [PAIR[1], PAIR[0], PAIR[1]]
    rows = [
        {"messages": [*PAIR, PAIR[0]]},
        {"messages": PAIR[:1]},
        {"text": "the hen"},
        {"prompt": "the hen", "completion": "12"},
        {"instruction": "the hen", "output": "12", "history": [["a", "b"]]},
        {"prompt": asked, "completion": answered},
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
    ]
    tokenizer = phi3_tokenizer(JULY)
    found = prepare_data(chats(*rows, loss_on="completion"), tokenizer, seed=0).train
    everything = prepare_data(chats(*rows, loss_on="all"), tokenizer, seed=0).train
    masks = [found[index][1] for index in range(len(rows))]
    for index in range(3):
        np.testing.assert_array_equal(masks[index], everything[index][1])
        assert masks[index].sum() == len(masks[index]) - 1
    targets = [tokenizer.decode(found[index][0][masks[index] == 1]) for index in range(3, 7)]
    end = "<|end|>"
    assert targets[0].split() == targets[1].split() == f"12{end}".split()
    said = tokenizer.decode(found[5][0])
    assert said.replace(" ", "").removesuffix("<|endoftext|>").endswith(targets[2].replace(" ", ""))
    assert (targets[2].count("12"), targets[2].count("the hen")) == (2, 1)
    assert masks[6].tolist() == [0, 0, 1, 1]


def test_the_marks_of_a_template_are_not_asked_where_the_completion_is(chats):
    rows = [{"prompt": PAIR[:1], "completion": [PAIR[1], PAIR[0], PAIR[1]]}, {"messages": [*PAIR, *PAIR]}]
    tokenizer = phi3_tokenizer(MARKED_LAST)
    sums = {}
    for loss_on in ("assistant", "completion", "all"):
        prepared = prepare_data(chats(*rows, loss_on=loss_on), tokenizer, seed=0).train
        sums[loss_on] = [int(prepared[index][1].sum()) for index in range(2)]
    assert sums["assistant"][0] < sums["completion"][0] < sums["all"][0]
    assert sums["assistant"][1] < sums["completion"][1] == sums["all"][1]


def test_how_rows_are_parted_for_the_tokenizer_changes_nothing(chats, monkeypatch):
    data = chats(*({"prompt": "x", "completion": "y " * (index % 9 + 1)} for index in range(50)))
    whole = prepare_data(data, phi3_tokenizer(JULY), seed=0).train
    lengths = []
    encode = ChatTokenizer.encode

    def counted(self, documents):
        lengths.append((len(documents), sum(len(document.text) for document in documents)))
        return encode(self, documents)

    monkeypatch.setattr(ChatTokenizer, "encode", counted)
    monkeypatch.setattr("phi3_jax.data.row_tokenizer._CHUNK", 7)
    monkeypatch.setattr("phi3_jax.data.row_tokenizer._CHUNK_TEXT", 300)
    parted = prepare_data(data, phi3_tokenizer(JULY), seed=0).train
    assert sum(number for number, _ in lengths) == 50
    assert max(number for number, _ in lengths) <= 7
    assert max(length for _, length in lengths) <= 300
    for name in ("input_ids", "loss_mask", "offsets", "prompt_lengths"):
        np.testing.assert_array_equal(getattr(parted, name), getattr(whole, name))


def test_the_first_row_that_is_wrong_is_told_and_rows_left_out_are_named_in_order(chats, monkeypatch):
    """A fault that shows when a row is tokenised comes before that of a later row, which shows when it is read."""
    far, silent = {"messages": [{"role": "user", "content": "x" * 99}, PAIR[1]]}, {"messages": PAIR[:1]}
    data = chats({"messages": PAIR}, far, silent, {"messages": PAIR}, {"messages": 5}, far)
    for size in (2, 1000):
        monkeypatch.setattr("phi3_jax.data.row_tokenizer._CHUNK", size)
        with pytest.raises(InputError, match="row 2: all its targets lie beyond"):
            prepare_data(data, phi3_tokenizer(JULY), seed=0)
        with pytest.raises(InputError, match="row 5"):
            prepare_data(dataclasses.replace(data, skip_empty=True), phi3_tokenizer(JULY), seed=0)
        stats = prepare_data(dataclasses.replace(data, skip_invalid=True), phi3_tokenizer(JULY), seed=0).train.stats
        assert [where.rpartition("row ")[2] for where, _ in stats.left_out] == ["2", "3", "5", "6"]
        assert (stats.rows, stats.skipped, stats.invalid) == (2, 3, 1)


def test_rows_that_the_tokenizer_refuses_are_found_among_others(chats, monkeypatch):
    encode, asked = ChatTokenizer.encode, []

    def refusing(self, documents):
        asked.append(len(documents))
        for document in documents:
            if "z" in document.text:
                raise InputError(f"{document.where}: the tokenizer gives up")
        return encode(self, documents)

    monkeypatch.setattr(ChatTokenizer, "encode", refusing)
    rows = [{"prompt": "x", "completion": "z" if index in (5, 40, 41) else "y"} for index in range(64)]
    data = chats(*rows, skip_invalid=True)
    stats = prepare_data(data, phi3_tokenizer(JULY), seed=0).train.stats
    assert [where.rpartition("row ")[2] for where, _ in stats.left_out] == ["6", "41", "42"]
    assert len(asked) < 32  # not one by one
    with pytest.raises(InputError, match="row 6: the tokenizer gives up"):
        prepare_data(dataclasses.replace(data, skip_invalid=False), phi3_tokenizer(JULY), seed=0)


def test_the_end_of_a_longer_row_is_kept_where_that_is_wanted(chats):
    row = {"messages": [{"role": "user", "content": "x " * 60}, PAIR[1]]}
    tokenizer = phi3_tokenizer(JULY)
    whole = prepare_data(chats(row, max_length=None, packing=False), tokenizer, seed=0).train
    kept = prepare_data(chats(row, max_length=32, truncation_mode="keep_end"), tokenizer, seed=0).train
    np.testing.assert_array_equal(kept[0][0], whole[0][0][-32:])
    np.testing.assert_array_equal(kept[0][1], whole[0][1][-32:])
    assert (kept.stats.truncated, whole.stats.truncated) == (1, 0)
    assert "1 row lost their beginning" in kept.stats.notices[-1]
    [(ids, answer)], [(all_ids, _)] = kept.prompts, whole.prompts
    assert (answer, ids.tolist()) == ("12", all_ids[len(whole[0][0]) - 32 :].tolist())
    # Nothing comes before the first token that is kept.
    everything = prepare_data(chats(row, max_length=32, truncation_mode="keep_end", loss_on="all"), tokenizer, seed=0)
    assert everything.train[0][1].tolist() == [0] + [1] * 31
    with pytest.raises(InputError, match="all its targets lie before the last data.max_length 32"):
        prepare_data(
            chats({"messages": [*PAIR, row["messages"][0]]}, max_length=32, truncation_mode="keep_end"),
            tokenizer,
            seed=0,
        )
