"""The examples in the package's docstrings give what they say, and say nothing besides."""

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import phi3_jax

ROOT = Path(phi3_jax.__file__).parent
# Only what has examples is imported: some modules bring much along.
MODULES = [
    ".".join(file.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    for file in sorted(ROOT.rglob("*.py"))
    if ">>> " in file.read_text()
]
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    capfd.readouterr()
    results = doctest.testmod(module, optionflags=OPTIONS)
    said = capfd.readouterr()
    assert results.failed == 0, said.out
    assert results.attempted > 0
    assert said.err == ""


def test_every_public_function_has_an_example():
    functions = {name: getattr(phi3_jax, name) for name in phi3_jax.__all__}
    functions = {name: one for name, one in functions.items() if inspect.isroutine(one)}
    assert len(functions) > 15
    assert not [name for name, one in functions.items() if ">>> " not in (one.__doc__ or "")]
