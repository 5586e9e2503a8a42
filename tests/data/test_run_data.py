"""What a run trains on, prepared or streamed."""

import json

import pytest

from phi3_jax.config.sections import DataSection
from phi3_jax.data.run_data import first_rows, load_data, run_batches
from phi3_jax.system.errors import InputError
from tests.helpers.tokenizers import tiny_tokenizer

ROWS = [{"prompt": "a" * (1 + n % 5), "completion": "bc"[n % 2]} for n in range(20)]
SHAPE = {"batch_size": 2, "accumulation": 1, "epochs": 1, "seed": 0, "pad_id": 0}


@pytest.mark.parametrize("settings", [{}, {"template": "none", "final_eos": True, "literal_roles": ["tool"]}])
def test_streamed_rows_are_those_that_are_prepared(tmp_path, settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    found = []
    for streaming in (False, True):
        data = DataSection(
            train=str(path), eval=str(path), max_length=64, packing=False, streaming=streaming, **settings
        )
        loaded = load_data(data, tiny_tokenizer(), seed=0)
        batches = run_batches(loaded.train, data, **SHAPE)
        found.append(sorted(ids.tolist() for batch in batches for ids in batch["input_ids"][0]))
        batches.close()
        assert loaded.stats["train"]["rows"] == loaded.stats["eval"]["rows"] == len(loaded.eval_sets["eval"]) == 20
        assert loaded.stats["train"]["target_tokens"] == loaded.stats["eval"]["target_tokens"]
        assert first_rows(loaded.train).where(0) == f"{path}, row 1"
        assert loaded.longest <= 64
    assert found[0] == found[1]
    lines = [line for line in loaded.summary().splitlines() if line[0] != " "]
    assert [line[:14] for line in lines] == ["train, streame", "eval: 20 rows,"]


def test_evaluation_rows_of_another_split_and_of_memory():
    data = DataSection(streaming=True)
    loaded = load_data(data, tiny_tokenizer(), seed=0, train=lambda: iter(ROWS), eval=ROWS[:3])
    assert (len(loaded.eval_sets["eval"]), loaded.eval_sets["eval"].where(2)) == (3, "eval_dataset, row 3")
    assert load_data(data, tiny_tokenizer(), seed=0, train=ROWS).eval_sets == {}


def test_a_token_beyond_the_embedding_is_met_before_its_step():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["new"])
    rows = [*ROWS * 10, {"prompt": "a", "completion": "new"}]
    for streaming, given in ((False, rows), (True, rows[::-1])):
        with pytest.raises(InputError, match="train_dataset, row .*token 'new' has id"):
            load_data(DataSection(streaming=streaming), tokenizer, seed=0, train=given, table_rows=len(tokenizer) - 1)
    loaded = load_data(DataSection(streaming=True), tokenizer, seed=0, train=rows, table_rows=len(tokenizer) - 1)
    batches = loaded.train.batches(**SHAPE)
    with pytest.raises(InputError, match="train_dataset, row 201: token 'new' has id"):
        list(batches)
    batches.close()
