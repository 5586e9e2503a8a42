"""What the documents name must exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("document", ["variants.md", "reliability.md"])
def test_the_tests_that_a_table_names_are_there(document):
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)", (ROOT / "docs" / document).read_text(encoding="utf-8"))
    assert len(named) > 20
    for file, name in named:
        assert re.search(rf"^(def|class) {name}\b", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), name
