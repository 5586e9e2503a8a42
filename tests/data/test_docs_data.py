"""The rows on docs/data.md give what stands below them."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from phi3_jax.config.sections import DataSection
from phi3_jax.data import DataStats, prepare_data
from phi3_jax.data.preview import mark, runs
from phi3_jax.system.errors import InputError
from tests.helpers.tokenizers import CHATML_TOKENS, PHI_4_MINI, bytes_tokenizer, phi3_tokenizer, phi4_mini_tokenizer
from tests.helpers.tool_templates import MARKED_LAST, UNMARKED_TOOLS

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
# A row, and what is said between it and what comes of it; there may be several such parts.
ROW = re.compile(r"^```json\n(.*?)^```\n(.*?)(?=^```json|^#|\Z)", re.MULTILINE | re.DOTALL)
RESULT = re.compile(r"(.*?)^```text\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
SETTING = re.compile(r"`data\.(\w+): (.+?)`")
TEMPLATE = re.compile(r"<!-- template: (\w+) -->")

DOCUMENTS = "{% for d in documents or [] %}{{ '<|system|>' + d.title + ': ' + d.text + '<|end|>' }}{% endfor %}"
TOKENIZERS = {
    "phi-4-mini": phi4_mini_tokenizer,
    "tools": lambda: bytes_tokenizer(UNMARKED_TOOLS, CHATML_TOKENS),
    "marked": lambda: phi3_tokenizer(MARKED_LAST),
    "documents": lambda: phi4_mini_tokenizer(DOCUMENTS + PHI_4_MINI),
}


def examples():
    for row, rest in ROW.findall(PAGE):
        for said, result in RESULT.findall(rest):
            yield row, said, result


def trained_on(row, said):
    """What becomes of a row with the settings and the template that are said."""
    Path("rows.jsonl").write_text(json.dumps(json.loads(row)))
    settings = {name: yaml.safe_load(value) for name, value in SETTING.findall(said)}
    (name,) = TEMPLATE.findall(said) or ["phi-4-mini"]
    tokenizer = TOKENIZERS[name]()
    try:
        rows = prepare_data(DataSection(train="rows.jsonl", **settings), tokenizer, seed=0).train
    except InputError as error:
        return f"phi3-jax: {error}"
    return mark(runs(rows, tokenizer, 0, tokens=10_000))


@pytest.mark.parametrize(("row", "said", "result"), list(examples()))
def test_rows_give_what_stands_below_them(row, said, result, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Lines are broken there for reading.
    assert result.replace("\n", "") == trained_on(row, said)


def test_every_format_has_a_row():
    keys = {key for row, _, _ in examples() for key in json.loads(row)}
    assert keys >= {"messages", "conversations", "instruction", "prompt", "completion", "text", "input_ids"}
    assert len(list(examples())) > 20


def test_every_key_is_in_the_tables():
    keys = PAGE[PAGE.index("\n## Keys of `data`") :]
    assert {field.name for field in fields(DataSection)} == set(re.findall(r"`(\w+)`", "".join(_first_cells(keys))))
    counts = PAGE[PAGE.index("\n## `phi3-jax data`") : PAGE.index("\n## Keys of `data`")]
    told = set(re.findall(r"`(\w+)`", "".join(_first_cells(counts))))
    assert told == {field.name for field in fields(DataStats)} | {"name", "first_rows"}


def _first_cells(text):
    return re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
