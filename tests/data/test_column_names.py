"""Columns with other names than ours."""

import pytest

from phi3_jax import InputError
from phi3_jax.data.column_names import suggested_columns
from phi3_jax.data.formats import PARTS, read_row


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"question": "a", "answer": "b"}, "{prompt: question, completion: answer}"),
        ({"id": 1, "query": "a", "response": "b"}, "{prompt: query, completion: response}"),
        ({"input": "a", "output": "b"}, "{prompt: input, completion: output}"),
        ({"prompt": "a", "response": "b"}, "{completion: response}"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "{completion: chosen}"),
        ({"instruction": "a", "context": "c", "response": "b"}, "{input: context, output: response}"),
        ({"instruction": "a", "response": "b"}, "{output: response}"),
        ({"User": "a", "Assistant": "b"}, "{prompt: User, completion: Assistant}"),
    ],
)
def test_what_is_advised_can_be_read(row, columns):
    with pytest.raises(InputError) as refused:
        read_row(row, "row 1")
    assert f"data.columns, such as {columns}" in str(refused.value)
    found = read_row(row, "row 1", columns=suggested_columns(row, PARTS))
    assert [turn.content.replace("\n", "") for turn in found.turns] == ["ac" if "context" in row else "a", "b"]


@pytest.mark.parametrize("name", ["conversation", "dialog", "Dialogue", "mesages", "message"])
def test_turns_under_another_name(name):
    row = {"id": 3, name: [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert suggested_columns(row, PARTS) == {"messages": name}
    with pytest.raises(InputError, match=f"data.columns, such as {{messages: {name}}}"):
        read_row(row, "row 1")


def test_nothing_is_advised_where_nothing_is_known():
    assert suggested_columns(["colour", "size"], PARTS) is None
    assert suggested_columns([], PARTS) is None
    with pytest.raises(InputError, match="such as {prompt: question, completion: answer}"):
        read_row({"colour": "blue"}, "row 1")
