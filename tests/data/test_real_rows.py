"""Every row of real data sets gets the ids of `apply_chat_template`, with the released tokenizers and templates."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phi3_jax.config.sections import DataSection
from phi3_jax.data.chat import ChatTokenizer
from phi3_jax.data.row_tokenizer import Row, RowTokenizer
from phi3_jax.data.rows import DataStats
from phi3_jax.data.sources import load_sources
from phi3_jax.hf.tokenizer import load_tokenizer
from tests.helpers.tokenizers import PHI_4, PHI_4_TOKENS, phi4_mini_tokenizer, phi4_tokenizer

# Where the tokenizer and where the template is from; those that are not at hand have a stand-in.
RELEASED = {
    "april": ("phi-3-mini-4k-instruct", "phi-3-mini-4k-instruct"),
    "july": ("phi-3-mini-4k-instruct", "phi-3-mini-4k-instruct.2024-07"),
    "phi-3.5": ("phi-3.5-mini-instruct", "phi-3.5-mini-instruct"),
}
STAND_INS = {
    "phi-4-mini": phi4_mini_tokenizer,
    "phi-4": lambda: phi4_tokenizer(PHI_4, markers=PHI_4_TOKENS),
}
SETS: dict[str, dict[str, str] | None] = {
    "alpaca/alpaca_en_demo.json": None,
    "gsm8k/test-200.jsonl": {"prompt": "question", "completion": "answer"},
    "gsm8k/train-1500.jsonl": {"prompt": "question", "completion": "answer"},
    "messages/v1_sft_demo.jsonl": None,
    "phi3cookbook/dataset-classification.jsonl": {"prompt": "phrase", "completion": "tone"},
    "phi3cookbook/mlx_test.jsonl": None,
    "phi3cookbook/mlx_train.jsonl": None,
    "phi3cookbook/mlx_valid.jsonl": None,
    "sharegpt/dummy_conversation.json": None,
}


def tokenizer_of(name: str, testdata: Path, folder: Path) -> Any:
    if name in STAND_INS:
        return STAND_INS[name]()
    words, template = (testdata / "models" / part for part in RELEASED[name])
    shutil.copy(words / "tokenizer.json", folder)
    shutil.copy(template / "tokenizer_config.json", folder)
    return load_tokenizer(folder)


def right(tokenizer: Any, row: dict[str, Any], columns: dict[str, str] | None) -> list[int]:
    """The ids as transformers has them."""
    if "text" in row:
        ids = tokenizer(row["text"])["input_ids"]
        return ids if ids[-1] in tokenizer.added_tokens_decoder else [*ids, tokenizer.eos_token_id]
    messages = list(turns(row, columns))
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))


def turns(row: dict[str, Any], columns: dict[str, str] | None) -> Iterator[dict[str, str]]:
    if "messages" in row:
        for turn in row["messages"]:
            yield {"role": turn["role"], "content": "".join(part["value"] for part in turn["content"])}
    elif "conversations" in row:
        for turn in row["conversations"]:
            yield {"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": turn["value"]}
    elif "instruction" in row:
        asked = f"{row['instruction']}\n\n{row['input']}" if row["input"].strip() else row["instruction"]
        yield {"role": "user", "content": asked}
        yield {"role": "assistant", "content": row["output"]}
    else:
        assert columns is not None
        yield {"role": "user", "content": row[columns["prompt"]]}
        yield {"role": "assistant", "content": row[columns["completion"]]}


@pytest.mark.parametrize("step", [pytest.param(40, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [*RELEASED, *STAND_INS])
def test_ids_of_every_row(testdata, tmp_path, name, step):
    tokenizer = tokenizer_of(name, testdata, tmp_path)
    chat = ChatTokenizer(tokenizer)
    control = re.compile("|".join(re.escape(token.content) for token in tokenizer.added_tokens_decoder.values()))
    compared = 0
    for file, columns in SETS.items():
        [source] = load_sources(str(testdata / "datasets" / file), split="train")
        if "mlx" in file and name == "phi-4":
            continue  # written with the tokens of Phi-3
        rows = [Row(source, index) for index in range(0, len(source.rows), step)]
        data = DataSection(train=file, columns=columns, max_length=2**17)
        if "mlx" in file:
            data = DataSection(train=file, loss_on="all", max_length=2**17)
        found = RowTokenizer(chat, data, DataStats())(rows)
        for row, tokenised in zip(rows, found, strict=True):
            given: Any = row.columns
            if "text" not in given and control.search(json.dumps(given)):
                continue  # what stays text is another test's
            assert tokenised.ids.tolist() == right(tokenizer, given, columns), row.where
            compared += 1
    assert compared > 4_000 / step
