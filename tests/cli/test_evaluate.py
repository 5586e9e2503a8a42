"""`phi3-jax evaluate`."""

import json

from phi3_jax.cli import main


def test_evaluate_prints_the_loss_of_base_and_adapter(base, adapter, chats, capfd):
    arguments = ["evaluate", "--model", str(base), "--data", str(chats), "--max-length", "64"]
    assert main([*arguments, "--json"]) == 0
    plain = json.loads(capfd.readouterr().out)
    assert main([*arguments, "--json", "--adapter", str(adapter)]) == 0
    adapted = json.loads(capfd.readouterr().out)
    assert plain["rows"] == adapted["rows"] == 6
    assert plain["eval_loss"] != adapted["eval_loss"]
    assert main(arguments) == 0
    assert f"{plain['eval_loss']:.4f}" in capfd.readouterr().out
