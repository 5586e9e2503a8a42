"""Versions of packages, and that what is imported is declared."""

import ast
import re
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

from phi3_jax.system.packages import package_versions

ROOT = Path(__file__).parents[2]
# Where a distribution is not called as what is imported from it.
IMPORTED_AS = {"orbax_checkpoint": "orbax", "pyyaml": "yaml", "rouge_score": "rouge_score"}


def test_a_package_that_is_not_there_is_told_in_words():
    assert package_versions("jax", "no-such-package") == {"jax": version("jax"), "no-such-package": "not installed"}


def declared(requirements: list[str]) -> set[str]:
    """What is imported from the distributions of such lines."""
    names = [re.match(r"[\w.-]+", line)[0].lower().replace("-", "_") for line in requirements]
    return {IMPORTED_AS.get(name, name).lower() for name in names}


def test_what_the_package_imports_is_declared_and_what_is_declared_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    imported = set()
    for file in (ROOT / "phi3_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            imported |= {name.split(".")[0] for name in names}
    imported = {name.lower() for name in imported - sys.stdlib_module_names - {"phi3_jax"}}
    always = declared(project["dependencies"])
    extras = [project["optional-dependencies"][extra] for extra in ("wandb", "eval", "lm-eval")]
    optional = set().union(*map(declared, extras))
    assert imported <= always | optional
    assert always <= imported
