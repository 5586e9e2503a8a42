"""Ways of handing tools and calls over: the given one first, then what other templates look for."""

import json

import pytest

from phi3_jax.data.control_tokens import ControlTokens
from phi3_jax.data.ways import CALL_TOKENS, functions, ways_of_calls, ways_of_tools
from phi3_jax.system.errors import InputError
from tests.helpers.tokenizers import JULY, phi3_tokenizer, phi4_mini_tokenizer

ASK = {"role": "user", "content": "u"}
TOOLS = [{"name": "f"}]


def call(arguments):
    return {"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


def test_tools_are_an_argument_or_stand_in_a_system_turn_which_may_be_added():
    bare, ways = ways_of_tools([ASK], TOOLS, "row 1")
    as_argument, in_turn = (way((bare, ())) for way in ways)
    assert (as_argument.messages, as_argument.variables, as_argument.added) == ([ASK], {"tools": TOOLS}, 0)
    assert in_turn.messages == [{"role": "system", "content": "", "tools": json.dumps(TOOLS)}, ASK]
    assert in_turn.added == 1
    bare, ways = ways_of_tools([{"role": "system", "content": "s", "tools": "[]"}, ASK], None, "row 1")
    assert bare[0] == {"role": "system", "content": "s"}
    assert [way((bare, ())).added for way in ways] == [0, 0, 0]
    with pytest.raises(InputError, match="row 1: has tools in a column and in turn 1"):
        ways_of_tools([{**ASK, "tools": "[]"}], TOOLS, "row 1")


def test_arguments_are_as_given_objects_or_text_and_written_where_tokens_exist_for_it():
    ways = ways_of_calls([call({"x": 1})], ControlTokens(phi3_tokenizer(JULY)))
    given = [next(functions(way([call({"x": 1})])[0][0]))["arguments"] for way in ways]
    assert given == [{"x": 1}, {"x": 1}, '{"x": 1}']
    *_, written = ways_of_calls([call({})], ControlTokens(phi4_mini_tokenizer()))
    [turn], remarks = written([call('{"x": 1}')])
    begin, end = CALL_TOKENS
    assert turn == {"role": "assistant", "content": f'a{begin}[{{"name": "f", "arguments": {{"x": 1}}}}]{end}'}
    assert "written" in remarks[0]
