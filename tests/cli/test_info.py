"""`phi3-jax info`."""

import json
import shutil
from pathlib import Path

from safetensors.numpy import load_file

from phi3_jax.cli import main
from tests.helpers.tokenizers import JULY


def test_info_tells_what_a_checkpoint_holds(base, capfd):
    assert main(["info", str(base), "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    stored = sum(a.size for file in base.glob("model-*.safetensors") for a in load_file(file).values())
    assert facts["parameters"] == stored == sum(facts["parameters_by_module"].values())
    assert facts["config"]["num_key_value_heads"] == 2
    assert facts["chat_template"]["text"] == JULY
    assert facts["weights"]["dtypes"] == {"float32": 2 * 6 + 3}
    assert main(["info", str(base)]) == 0
    text = capfd.readouterr().out
    assert f"{stored:,}" in text
    assert "<|system|>" in text


def test_info_counts_the_parameters_of_a_folder_without_weights(testdata, capfd):
    assert main(["info", str(testdata / "models" / "phi-3-mini-4k-instruct"), "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["parameters"] == 3_821_079_552
    assert facts["weights"] is None


def test_info_on_a_run_tells_of_the_run(tmp_path, capfd):
    run = shutil.copytree(Path(__file__).parents[1] / "from_before" / "lora", tmp_path / "run")
    assert main(["info", str(run)]) == 0
    said = capfd.readouterr().out
    assert "the checkpoint of step 2 is the newest" in said
    assert f"phi3-jax train --config {run}/config.yaml --training.resume_from_checkpoint true" in said
    assert main(["info", str(run), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["run"]["state"] == "stopped"
