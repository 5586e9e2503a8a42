import shutil
from pathlib import Path

import pytest

from tests.helpers.worlds import World, write_world


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """A checkpoint, an adapter of it and rows of data, that every test has a copy of."""
    return write_world(tmp_path_factory.mktemp("malformed") / "world").root


@pytest.fixture
def world(whole, tmp_path, monkeypatch) -> World:
    shutil.copytree(whole, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return World(tmp_path / "world")
