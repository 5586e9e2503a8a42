"""The scripts by which shells complete commands."""

import subprocess

import pytest

from phi3_jax.cli import main
from phi3_jax.cli.main import COMMANDS


def script(shell, capsys) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("tr", ["train"]),
        ("train --training.learn", ["--training.learning_rate"]),
        ("train --model.dtype b", ["bfloat16"]),
        ("train --model.dtype = f", ["float32", "float16"]),
        ("train --data.packing t", ["true"]),
        ("train --training.dataloader_num", []),  # passed over, so not offered
        ("benchmark g", ["generate"]),
        ("generate --dt", ["--dtype"]),
        ("generate --prompt x", []),
        ("completion z", ["zsh"]),
    ],
)
def test_bash_completes_commands_options_and_values(typed, expected, tmp_path, capsys):
    file = tmp_path / "script"
    file.write_text(script("bash", capsys))
    lines = f"source {file}\nCOMP_WORDS=(phi3-jax {typed})\nCOMP_CWORD=$((${{#COMP_WORDS[@]}}-1))\n_phi3_jax\n"
    done = subprocess.run(
        ["bash", "-c", lines + 'printf "%s\\n" "${COMPREPLY[@]}"'], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert done.stdout.split() == expected


def test_zsh_takes_the_script_of_bash_and_fish_has_its_own(capsys):
    assert script("bash", capsys) in script("zsh", capsys)
    fish = script("fish", capsys)
    for command in COMMANDS:
        assert f"-a {command} -d " in fish
    assert "\"__fish_seen_subcommand_from train\" -l model.quantization -r -f -a 'none nf4 int8'\n" in fish
