"""A row's ids are those of `apply_chat_template`, and a marking template's targets those of transformers."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_jax.data.chat import ChatTokenizer
from phi3_jax.data.formats import read_row
from tests.helpers.generated_rows import applied, assistant_mask, expected, kinds, prepared, rows, shown
from tests.helpers.tokenizers import PHI_4_MINI, PHI_4_MINI_TOKENS, phi4_mini_tokenizer

KINDS = kinds()
CHATS = {name: ChatTokenizer(kind.tokenizer) for name, kind in KINDS.items()}
MARKING = [name for name in KINDS if name.startswith("marked")]
# All of the 500 rows in the slow tests, the first of them always.
EXAMPLES = [pytest.param(20, id="some"), pytest.param(500, id="many", marks=pytest.mark.slow)]


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", KINDS)
def test_ids_are_those_of_apply_chat_template(name, examples):
    kind = KINDS[name]

    @given(row=rows(kind, literal=False))
    @settings(max_examples=examples, deadline=None, database=None)
    def check(row):
        [(ids, _)], stats = prepared(CHATS[name], [row])
        assert ids == applied(kind, row) == expected(kind, row)
        assert not stats.literal_rows

    check()


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", KINDS)
def test_tokens_stay_text_where_they_are_no_instructions(name, examples):
    kind = KINDS[name]

    @given(row=rows(kind, literal=True))
    @settings(max_examples=examples, deadline=None, database=None)
    def check(row):
        [(ids, _)], stats = prepared(CHATS[name], [row])
        assert ids == expected(kind, row)
        assert stats.literal_rows == (ids != applied(kind, row))

    check()


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", ["phi-3.5", "tools"])
def test_tokens_count_in_everybodys_text_where_no_role_is_literal(name, examples):
    kind, chat = KINDS[name], ChatTokenizer(KINDS[name].tokenizer, literal_roles=[])

    @given(row=rows(kind, literal=True))
    @settings(max_examples=examples, deadline=None, database=None)
    def check(row):
        [(ids, _)], stats = prepared(chat, [row])
        assert ids == expected(kind, row, literal_roles=())
        assert stats.literal_rows == (ids != applied(kind, row))

    check()


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", MARKING)
def test_targets_are_those_that_the_template_marks(name, examples):
    kind = KINDS[name]

    @given(row=rows(kind, literal=False))
    @settings(max_examples=examples, deadline=None, database=None)
    def check(row):
        [(ids, mask)], _ = prepared(CHATS[name], [row])
        tokenizer = kind.tokenizer
        assert shown(tokenizer, ids, mask) == shown(tokenizer, ids, assistant_mask(kind, row))

    check()


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", KINDS)
def test_prompts_end_where_the_answer_begins(name, examples):
    kind = KINDS[name]

    @given(row=rows(kind, literal=True), more=st.sampled_from(["x", "the 12 hen"]))
    @settings(max_examples=examples, deadline=None, database=None)
    def check(row, more):
        row = {**row, "messages": [*row["messages"], {"role": "user", "content": more}]}
        asked = read_row(row, "row 1")
        ids = CHATS[name].prompt(asked.turns, asked.given).tolist()
        assert ids == expected(kind, row, add_generation_prompt=True)

    check()


def test_the_stand_in_of_phi_4_mini_is_as_released(testdata):
    file = testdata / "models" / "phi-4-mini-instruct" / "tokenizer_config.json"
    released = json.loads(file.read_text())
    assert released["chat_template"] == PHI_4_MINI
    added = released["added_tokens_decoder"].values()
    assert tuple((token["content"], token["special"], token["rstrip"]) for token in added) == PHI_4_MINI_TOKENS
    assert not any(token["normalized"] or token["lstrip"] for token in added)
    ours = phi4_mini_tokenizer().added_tokens_decoder.values()
    assert tuple((token.content, token.special, token.rstrip) for token in ours) == PHI_4_MINI_TOKENS
