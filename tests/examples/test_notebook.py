"""The notebook as a reader runs it, from top to bottom."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "finetune_phi3.ipynb"

# Run after the notebook's own cells: what they have found, and ROUGE as rouge-score gives it.
FIGURES = """
from statistics import fmean
from rouge_score.rouge_scorer import RougeScorer

def rouge(name):
    kinds = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    scorer = RougeScorer(kinds, use_stemmer=True)
    rows = evaluation.predictions[name]
    scores = [scorer.score(row.reference, row.answer) for row in rows]
    assert [row.reference for row in rows] == [row["messages"][1]["content"] for row in held_out[: len(rows)]]
    return {kind: fmean(score[kind].fmeasure for score in scores) for kind in kinds}

print(json.dumps({
    "loss": losses["loss"],
    "eval_loss": losses["eval_loss"],
    "qlora_loss": qlora_losses["loss"],
    "qlora_eval_loss": qlora_results["eval_loss"],
    "exact": [exact_before, exact_after],
    "new_adapter_is_none": unchanged,
    "peft": difference,
    "trainable": table.trainable,
    "evaluation": evaluation.to_dict()["models"],
    "rouge": {name: rouge(name) for name in evaluation.predictions},
}))
"""


@pytest.fixture(scope="module")
def notebook():
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_it_is_committed_without_outputs_and_without_a_trace_of_whoever_ran_it(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) >= 10
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert not re.search(r"(?<![\w.:/])/(?!/)\w+/|[A-Z]:\\\\|file://", NOTEBOOK.read_text(encoding="utf-8"))


def test_its_first_cell_says_how_to_run_it_and_the_real_model_is_not_asked_for_by_itself(notebook):
    assert "jupyter lab examples/finetune_phi3.ipynb" in notebook.cells[0].source
    real = [cell.source for cell in notebook.cells if cell.cell_type == "code" and "microsoft/" in cell.source]
    assert len(real) == 1
    assert real[0].startswith("REAL = False\n\nif REAL:\n    ")
    # Nothing after that line stands outside of the block.
    assert all(line.startswith("    ") for line in real[0].splitlines()[3:])


@pytest.mark.slow
def test_it_runs_from_top_to_bottom_and_teaches_the_model(notebook, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    pytest.importorskip("rouge_score")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.from_dict(notebook)
    notebook.cells.append(nbformat.v4.new_code_cell(FIGURES))
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    figures = json.loads(notebook.cells[-1].outputs[0].text)

    [(first_step, first), *_, (_, last)] = figures["eval_loss"]
    assert first_step == 0
    assert last < 0.05 * first
    for name in ("loss", "qlora_loss"):
        values = [loss for _, loss in figures[name]]
        assert values[-1] < 0.1 * values[0]
    assert figures["qlora_eval_loss"] < 0.1 * first
    before, after = figures["exact"]
    assert before == 0
    assert after >= 0.6
    assert figures["new_adapter_is_none"] is True
    assert figures["trainable"] > 0
    # None where PyTorch or PEFT is not installed.
    assert figures["peft"] is None or figures["peft"] < 1e-5
    for model, scores in figures["rouge"].items():
        found = {name: estimate["value"] for name, estimate in figures["evaluation"][model].items() if name in scores}
        assert found == pytest.approx(scores, abs=1e-12)
    adapted, base = figures["evaluation"]["lora"], figures["evaluation"]["base"]
    for name in ("rougeL", "exact_match"):
        assert base[name]["high"] < adapted[name]["low"] <= adapted[name]["value"] <= 1
        assert adapted[name]["p_value"] < 0.01
    assert (tmp_path / "out" / "notebook" / "merged" / "model.safetensors").is_file()
    errors = [output for cell in notebook.cells for output in cell.get("outputs", ()) if output.output_type == "error"]
    assert errors == []
