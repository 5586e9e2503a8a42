"""What an evaluation has found."""

import json

from phi3_jax.cli import main
from tests.helpers.evaluations import ROWS, arguments


def test_the_table_and_the_object(inputs, capfd):
    argv = arguments(inputs, "--adapter", inputs / "one" / "adapter", "--metrics", "loss")
    assert main([*argv, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert main(argv) == 0
    table = capfd.readouterr().out
    one = found["models"]["one"]["loss"]
    for words in ("7 rows", "minus base", f"{one['value']:.4f}", f"{one['difference']:+.4f}", f"{one['p_value']:.3f}"):
        assert words in table
    assert found["rows"] == ROWS
