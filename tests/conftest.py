"""Fixtures that every folder of tests uses."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def testdata() -> Path:
    """Real tokenizers, configs, data sets and a small trained model, where they are at hand."""
    root = Path(__file__).parents[1]
    folder = Path(os.environ.get("PHI3_JAX_TESTDATA", root.parent / "shared" / "testdata"))
    if not folder.is_dir():
        pytest.skip(f"test data not found at {folder}; set PHI3_JAX_TESTDATA")
    return folder
