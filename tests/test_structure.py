"""Where tests and what they share are to be found."""

import ast
from pathlib import Path

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("*.py"))


def imported(file: Path) -> set[str]:
    """The modules that a file names in its imports, those inside of functions too."""
    package = ("tests", *file.relative_to(TESTS).parent.parts)
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            module = base if node.level else node.module
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def test_no_test_imports_from_another_tests_file():
    found = {
        (str(file.relative_to(TESTS)), name)
        for file in FILES
        for name in imported(file)
        if name.split(".")[0] == "tests" and any(part.startswith("test_") for part in name.split(".")[1:])
    }
    assert not found


def test_what_tests_share_lies_in_helpers():
    stray = {
        str(file.relative_to(TESTS))
        for file in FILES
        if "helpers" not in file.parts
        and not file.name.startswith("test_")
        and file.name not in ("__init__.py", "conftest.py")
    }
    assert not stray


def test_every_modules_tests_are_found_by_its_name():
    package = TESTS.parent / "phi3_jax"
    modules = [file.relative_to(package) for file in package.rglob("*.py") if file.name != "__init__.py"]
    assert len(modules) > 100
    missing = {str(file) for file in modules if not (TESTS / file.parent / f"test_{file.name}").exists()}
    assert not missing
