"""`phi3-jax recipes`, and `--config NAME` of the commands that take a run."""

import yaml

from phi3_jax.cli import main
from phi3_jax.config.recipes import recipe_names


def test_recipes_are_listed_a_line_each(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [
        line.split()[0] for line in lines if line.split()[:1] in [[name] for name in recipe_names()]
    ] == recipe_names()
    (line,) = (line for line in lines if line.startswith("phi3_mini_4k_qlora"))
    assert all(word in line for word in ("Phi-3-mini-4k-instruct", "nf4", "8 GB"))


def test_a_recipe_is_printed_to_be_copied(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "own_chats_laptop"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    printed = []
    for config in ("own_chats_laptop", "mine.yaml"):
        assert main(["train", "--config", config, "--print_config"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert yaml.safe_load(printed[0])["training"]["num_train_epochs"] == 5
    assert main(["recipes", "own_chat"]) == 2
    assert "own_chats" in capsys.readouterr().err


def test_what_print_config_prints_is_a_configuration(capsys, tmp_path):
    """With underscores, as jsonargparse spells it, or hyphens; what is printed is read back the same."""
    command = ["train", "--config", "phi3_mini_4k_lora", "--data.train", "chats.jsonl"]
    outputs = []
    for option in ("--print_config", "--print-config"):
        assert main([*command, option]) == 0
        captured = capsys.readouterr()
        assert "packaged recipe" in captured.err
        outputs.append(captured.out)
    assert main([*command, "--print_config", "-q"]) == 0
    assert capsys.readouterr().err == ""
    (tmp_path / "merged.yaml").write_text(outputs[0])
    assert main(["train", "--config", str(tmp_path / "merged.yaml"), "--print-config"]) == 0
    assert {capsys.readouterr().out, *outputs} == {outputs[0]}
