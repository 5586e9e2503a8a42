"""The notebook for Colab's T4: its cells can be parsed, and its run fits there."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest

from phi3_jax.cli import main
from phi3_jax.demo import demo_path
from phi3_jax.performance.topology import JAX_GPU_SHARE
from tests.helpers.page_commands import check, split
from tests.helpers.plans import MINI

NOTEBOOK = Path(__file__).parents[2] / "examples" / "colab.ipynb"


def cells(kind):
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in found["cells"] if cell["cell_type"] == kind]


def _joined(cell):
    return cell.replace("\\\n", " ")


def commands():
    lines = [line[1:] for cell in cells("code") for line in _joined(cell).splitlines() if line.startswith("!")]
    return [words for line in lines for words in split(line)]


def test_it_is_a_notebook():
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))


def test_its_cells_can_be_parsed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for cell in cells("code"):
        ast.parse(re.sub(r"^!.*$", "", _joined(cell), flags=re.MULTILINE))
    for words in commands():
        if words[0] in ("phi3-jax", "pip"):
            check(words)
    assert sum(words[0] == "phi3-jax" for words in commands()) > 6


@pytest.mark.slow
def test_its_run_fits_on_a_t4(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # Phi-3-mini's size, and a tokenizer that is here.
    base = shutil.copytree(demo_path("base"), tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    (base / "config.json").write_text(json.dumps(MINI))
    assert main(["demo", "--rows", "."]) == 0
    (init,) = (words[1:] for words in commands() if words[:2] == ["phi3-jax", "init"])
    assert main([word if word != "microsoft/Phi-3-mini-4k-instruct" else str(base) for word in init]) == 0
    capsys.readouterr()
    assert main(["plan", "--config", "run.yaml", "--topology", "gpu:t4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["hbm_bytes_per_device"] < JAX_GPU_SHARE * found["hbm_limit_bytes"]
    assert not any("float16 is faster" in note for note in found["notes"])
