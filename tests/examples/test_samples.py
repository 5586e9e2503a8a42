"""The samples that Phi-3 comes with, carried over: each as a reader runs it, on a small model and few rows."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from phi3_jax.demo import demo_path

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = ("phi3_inference_finetuning.ipynb", "phi3_finetune_lora.ipynb", "phi3_finetune_qlora.ipynb")
SCRIPTS = ("finetraining_script.py", "sample_finetune_jax.py")


@pytest.fixture
def model(tmp_path):
    """The built-in base with room for the samples' 2,048 positions."""
    folder = shutil.copytree(demo_path("base"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    sizes = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps({**config, **sizes}))
    return folder


def conversations():
    rows = [json.loads(line) for line in demo_path("orders_train.jsonl").read_text().splitlines()]
    return [row["messages"] for row in rows]


def dataset(folder, rows, split="train"):
    """A data set in a folder, of a name that `load_dataset` finds splits by."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "data" / f"{split}-00000-of-00001.jsonl").write_text(lines)
    return folder


def environment(folder, model, rows):
    return {
        **os.environ,
        "MODEL": str(model),
        "DATASET": str(rows),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(folder / "hub"),
        "PYTHONPATH": str(EXAMPLES.parent),
    }


def run_script(name, folder, model, rows):
    command = [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(
        command, cwd=folder, env=environment(folder, model, rows), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def results(folder, name="all_results.json"):
    return json.loads((folder / name).read_text())


def test_the_notebooks_are_committed_without_outputs():
    for name in NOTEBOOKS:
        cells = json.loads((EXAMPLES / name).read_text())["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert code
        assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_every_sample_has_its_table():
    text = (EXAMPLES / "README.md").read_text()
    for name in (*NOTEBOOKS, *SCRIPTS):
        assert f"]({name})" in text
    # Lines that are quoted as ours stand in the samples.
    ours = "\n".join((EXAMPLES / name).read_text().replace('\\"', '"') for name in (*NOTEBOOKS, *SCRIPTS))
    quoted = re.findall(r"^\|[^|]*\| `([^`|]+)` \|", text, re.MULTILINE)
    assert len(quoted) > 20
    for line in quoted:
        assert line in ours, line


@pytest.mark.slow
def test_the_model_cards_script(tmp_path, model):
    rows = [{"prompt_id": str(i), "messages": turns} for i, turns in enumerate(conversations()[:40])]
    dataset(tmp_path / "rows", rows, "train_sft")
    dataset(tmp_path / "rows", rows[:8], "test_sft")
    said = run_script("sample_finetune_jax.py", tmp_path, model, tmp_path / "rows")
    out = tmp_path / "checkpoint_dir"
    assert "'eval_samples': 8" in said
    assert results(out)["eval_loss"] > 0
    assert set(results(out, "eval_results.json")) < set(results(out))
    config = results(out / "adapter", "adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (16, 32, 0.05)
    assert sorted(config["target_modules"]) == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]


@pytest.mark.slow
def test_the_cookbooks_script(tmp_path, model):
    rows = [{"conversations": sharegpt(turns)} for turns in conversations()[:60]]
    dataset(tmp_path / "rows", rows)
    run_script("finetraining_script.py", tmp_path, model, tmp_path / "rows")
    out = tmp_path / "New-Model-phi-3-mini-4k"
    # 9 batches of 7 are 3 steps of 4 an epoch.
    assert results(out)["global_step"] == 9
    assert (out / "model" / "model.safetensors").is_file()


def sharegpt(turns):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]


def alpaca(turns):
    question, answer = (turn["content"] for turn in turns[-2:])
    return {"instruction": question, "input": "", "output": answer, "prompt": question}


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_cookbooks_notebooks(tmp_path, model, name, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    make = (lambda turns: {"conversations": sharegpt(turns)}) if "inference" in name else alpaca
    dataset(tmp_path / "rows", [make(turns) for turns in conversations()[:60]])
    for key, value in environment(tmp_path, model, tmp_path / "rows").items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    nbformat.validate(notebook)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    if "inference" in name:
        assert (tmp_path / "New-Model-phi-3-mini-4k" / "model" / "model.safetensors").is_file()
        return
    out = tmp_path / ("phi-3-mini-QLoRA" if "qlora" in name else "phi-3-mini-LoRA")
    # 57 rows are two steps of 32 an epoch.
    assert results(out)["global_step"] == 6
    assert results(out)["eval_loss"] > 0
    assert (tmp_path / f"{out.name}-merged" / "model.safetensors").is_file()
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "rouge" in said.lower()
