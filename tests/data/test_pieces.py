"""The pieces that rows are cut into, and the sequences that they fill: those of TRL's pack_dataset."""

import datasets
import numpy as np
import pytest

from phi3_jax.config.sections import DataSection
from phi3_jax.data import DataStats, TokenizedRows, eval_batches, train_batches
from phi3_jax.data.packing import Order, packed_as_trl, plan_epoch
from phi3_jax.data.pieces import pieces
from phi3_jax.data.rows import Origins

CAPACITY = 64


def random_rows(number: int, longest: int) -> TokenizedRows:
    """Rows of many lengths, many of them equal, half of the tokens targets; the first tokens too."""
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, longest, number))])
    ids, mask = rng.integers(0, 999, offsets[-1]).astype(np.int32), rng.integers(0, 2, offsets[-1]).astype(np.uint8)
    origins = Origins(["rows.jsonl"], np.zeros(number, int), np.arange(number))
    prompts = np.zeros(number, np.int32)
    prompts[5] = 1
    return TokenizedRows(ids, mask, offsets, prompts, [str(row) for row in range(number)], DataStats(), origins)


@pytest.mark.parametrize(("strategy", "longest"), [("bfd", 65), ("bfd_split", 200), ("wrapped", 200)])
def test_sequences_are_those_of_pack_dataset_in_its_order(strategy, longest):
    trl = pytest.importorskip("trl")
    rows = random_rows(2300, longest)
    listed = [(ids.tolist(), np.where(mask, ids, -100).tolist()) for ids, mask in (rows[i] for i in range(len(rows)))]
    dataset = datasets.Dataset.from_dict({"input_ids": [a for a, _ in listed], "labels": [b for _, b in listed]})
    datasets.disable_progress_bars()
    expected = trl.pack_dataset(dataset, CAPACITY, strategy)
    data = DataSection(max_length=CAPACITY, packing_strategy=strategy, shuffle=False)
    cut = pieces(rows, data)
    packed = packed_as_trl(cut, data)
    assert [np.concatenate([cut[i][0] for i in rows]).tolist() for rows in packed] == expected["input_ids"]
    if strategy != "wrapped":
        assert [[len(cut[i][0]) for i in rows] for rows in packed] == expected["seq_lengths"]
    # Of the labels those of the first token of each document are never asked, as nothing comes before it.
    for sequence, labels in zip(packed, expected["labels"], strict=True):
        parts = [cut[i] for i in sequence]
        ours = np.concatenate([np.where(mask, ids, -100) for ids, mask in parts])
        if strategy != "bfd":
            assert not any(mask[0] for _, mask in parts)
        starts = np.cumsum([0, *(len(ids) for ids, _ in parts)])[:-1]
        theirs = np.array(labels)
        ours[starts] = theirs[starts] = -100
        np.testing.assert_array_equal(ours, theirs)
    assert plan_epoch(cut, data, Order(0), 0) == plan_epoch(cut, data, Order(1), 3) == packed


def test_pieces_are_named_by_the_row_they_begin_in_and_prompts_are_whole_rows():
    rows = random_rows(30, 200)
    for strategy in ("bfd_split", "wrapped"):
        cut = pieces(rows, DataSection(max_length=CAPACITY, packing_strategy=strategy))
        assert cut.lengths.max() == CAPACITY
        assert cut.lengths.sum() == rows.lengths.sum()
        for piece in range(len(cut)):
            number = int(cut.where(piece).removeprefix("rows.jsonl, row ")) - 1
            assert rows.offsets[number] <= cut.offsets[piece] < rows.offsets[number + 1]
        [(ids, reference)] = cut.prompts
        assert (ids.tolist(), reference) == (rows[5][0][:1].tolist(), "5")
    for data in (DataSection(packing_strategy="bfd"), DataSection(packing=False, packing_strategy="wrapped")):
        assert pieces(rows, data) is rows


def test_batches_hold_every_token_once_in_documents_or_end_to_end():
    rows = random_rows(40, 200)
    for strategy, documents in (("bfd_split", None), ("wrapped", 1)):
        data = DataSection(max_length=CAPACITY, packing_strategy=strategy)
        cut = pieces(rows, data)
        batches = train_batches(cut, data, batch_size=3, accumulation=2, epochs=1, seed=0, pad_id=0)
        for found in (list(batches), list(eval_batches(cut, data, batch_size=3, pad_id=0))):
            tokens = np.concatenate([batch["input_ids"][batch["segment_ids"] > 0] for batch in found])
            assert sorted(tokens.tolist()) == sorted(rows.input_ids.tolist())
            most = max(batch["segment_ids"].max() for batch in found)
            assert most == documents or (documents is None and most > 1)
