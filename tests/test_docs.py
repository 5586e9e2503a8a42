"""What the documents name must exist."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("document", ["variants.md", "reliability.md"])
def test_the_tests_that_a_table_names_are_there(document):
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)", text)
    assert len(named) > 20
    assert "`::" not in text  # short for a test of the file before, it goes wrong when that one moves
    for file, name in named:
        assert re.search(rf"^(def|class) {name}\b", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), name


PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")} - {ROOT / "CHANGELOG.md"})  # which tells of the past
PATH = re.compile(r"(?<![\w./-])((?:phi3_jax|tests|scripts|configs|examples|docs)/[\w./-]*\w)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_and_names_on_a_page_are_there(page):
    text = page.read_text(encoding="utf-8")
    for path in PATH.findall(text):
        assert (ROOT / path).exists(), path
    for name in set(re.findall(r"\bphi3_jax(?:\.\w+)+", text)) - {"phi3_jax.egg", "phi3_jax.tar.gz"}:
        assert _is_there(name), name


def _is_there(name):
    """Whether a dotted name is a module of the package, or something in one."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for part in parts[i:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def test_the_architecture_page_shows_the_rooms_as_the_layering_orders_them():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    shown = re.findall(r"^(\w+)/ +\S", page, re.MULTILINE)
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = pyproject["tool"]["importlinter"]["contracts"]
    assert not contract.get("ignore_imports")
    assert shown == [room.strip() for layer in contract["layers"] for room in layer.split("|")]
    assert sorted(shown) == sorted(path.parent.name for path in (ROOT / "phi3_jax").glob("*/__init__.py"))
    # Files are named there by room and name.
    for file in re.findall(r"`(\w+/\w+\.py)`", page):
        assert (ROOT / "phi3_jax" / file).is_file(), file
