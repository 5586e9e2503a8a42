"""What a wheel holds: everything that the package reads, recipes too."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from phi3_jax.config.recipes import recipe_names

ROOT = Path(__file__).parents[1]
BUILD = "import setuptools.build_meta as build; build.build_wheel('dist')"


@pytest.mark.slow  # builds one
def test_a_wheel_holds_all_that_the_package_reads(tmp_path):
    pytest.importorskip("setuptools")
    unwanted = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("phi3_jax", "configs"):  # the recipes are a link in the one to the other
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "dist").mkdir()
    subprocess.run([sys.executable, "-c", BUILD], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("phi3_jax/")}
    package = tmp_path / "phi3_jax"
    read = {str(file.relative_to(tmp_path)) for file in package.rglob("*") if file.is_file()}
    recipes = {f"phi3_jax/recipes/{name}.yaml" for name in recipe_names()}
    assert held == read | recipes
    assert len(recipes) > 10
