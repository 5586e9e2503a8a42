"""What the tests of this folder share."""

import json

import pytest

from phi3_jax.config.sections import DataSection


@pytest.fixture
def chats(tmp_path):
    """Writes rows to a JSONL file and gives its data section."""

    def write(*rows, **options):
        path = tmp_path / "chats.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return DataSection(train=str(path), **{"max_length": 64, **options})

    return write
