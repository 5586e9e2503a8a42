"""Tokens: that none is left in what is printed or written, however it came in."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from phi3_jax import InputError
from phi3_jax.system.secrets import redact, redact_command, remember
from phi3_jax.training.console import RunConsole
from tests.helpers.model_hub import Hub, serve
from tests.helpers.runs import run_config, write_inputs

HUB, OLD, WANDB = f"hf_{'Canary' * 5}abcd", "old-canary-token", "c0ffee" * 6 + "cafe"
TYPED, URL, FILE = "typed-canary", "url-canary", "file-canary"
CANARIES = (HUB, OLD, WANDB, TYPED, URL, FILE, "ame-canary")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"a {HUB}, b", "a REDACTED, b"),
        (f"hf_oauth_{'x' * 40}.y", "REDACTED"),
        ("https://me:secret@host:80/x", "https://REDACTED@host:80/x"),
        ("GET http://s3/x?a=1&X-Amz-Signature=0f0f&token=q b", "GET http://s3/x?a=1&REDACTED&REDACTED b"),
        ("Authorization: Bearer abc.def'", "Authorization: Bearer REDACTED'"),
        # What only looks like it.
        ("hf_cache hf-internal-testing/tiny-random hf_datasets_cache", None),
        ("a@b.c https://host/@me?page=1 c0ffeec0ffeec0ffeec0ffeec0ffeec0ffeecafe", None),
    ],
)
def test_what_is_hidden(text, expected):
    assert redact(text) == (text if expected is None else expected)


def test_tokens_of_the_environment_and_of_arguments_are_hidden_whatever_their_form(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", f"{WANDB}\n")
    monkeypatch.setenv("HF_TOKEN", "short")  # which is found all over
    assert redact(f"x{WANDB}y short") == "xREDACTEDy short"
    remember("given-as-an-argument")
    with pytest.raises(InputError, match="^REDACTED: no REDACTED here$"):
        raise InputError(f"given-as-an-argument: no {HUB} here")


def test_a_command_line_keeps_all_but_the_values_of_secret_options():
    command = ["phi3-jax", "train", "--training.hub_token", "a b", "--token=c", "--training.pad_token", "<pad>"]
    assert redact_command(command) == (
        "phi3-jax train --training.hub_token REDACTED --token=REDACTED --training.pad_token '<pad>'"
    )


def test_the_console_shows_none(monkeypatch, capsys):
    RunConsole(progress=False).print(f"resuming {HUB}")
    assert capsys.readouterr().out == "resuming REDACTED\n"


def test_an_error_that_nobody_catches_shows_none(monkeypatch):
    code = f"""
import sys
import phi3_jax.cli.info
from phi3_jax.cli import main
def fail(arguments):
    raise RuntimeError("GET https://me:{URL}@host {HUB}")
phi3_jax.cli.info.run = fail
sys.argv = ["phi3-jax", "info"]
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "RuntimeError: GET https://REDACTED@host REDACTED" in done.stderr
    assert "Traceback" in done.stderr
    assert not [name for name in CANARIES if name in done.stdout + done.stderr]


# Each command as its own process would run it, in one process: importing takes seconds.
COMMANDS = """
import json, sys
from phi3_jax.cli.main import main
for arguments, expected in json.loads(sys.stdin.read()):
    sys.argv = ["phi3-jax", *arguments]
    status = main(arguments)
    print("STATUS", status, arguments[0], flush=True)
    assert status == expected, (status, arguments[0])
"""
FAKE_WANDB = """
import json, os
class Run:
    def log(self, values, step): pass
    def finish(self): pass
def init(project, name, config, dir):
    json.dump([project, config], open(os.path.join(dir, "wandb.json"), "w"))
    return Run()
"""


def test_no_command_leaves_a_token_anywhere(tmp_path):
    """Private models from a hub, failing downloads, W&B, and tokens in the environment, options, files and URLs."""
    inputs = write_inputs(tmp_path / "inputs")
    files = {path.name: path.read_bytes() for path in (inputs / "base").iterdir()}
    run = run_config(inputs, training={"max_steps": 1, "eval_strategy": "no", "eval_steps": None})
    raw = run.to_dict()
    raw["model"]["name_or_path"] = "someone/private"
    raw["training"] |= {"output_dir": str(tmp_path / "out"), "hub_token": FILE}
    raw["logging"] |= {"wandb": True, "run_name": f"https://me:name-canary@host/{HUB}"}
    (inputs / "run.yaml").write_text(json.dumps(raw))
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(FAKE_WANDB)
    train = ["train", "--config", str(inputs / "run.yaml"), "--training.hub_token", TYPED]
    address = f"https://me:{URL}@127.0.0.1:9/x"
    data, adapter = str(inputs / "eval.jsonl"), str(tmp_path / "out" / "adapter")
    elsewhere = ["--training.output_dir", str(tmp_path / "not")]
    evaluate = ["evaluate", "--model", "someone/private", "--adapter", adapter, "--data", data]
    commands = [
        (train, 0),
        ([*evaluate, "--output_dir", str(tmp_path / "evaluation")], 0),
        (["export", "--merge", adapter, "--output", str(tmp_path / "merged")], 0),
        (["info", "someone/private", "--json"], 0),
        (["info", "someone/other"], 2),
        (["info", address], 2),
        ([*train, *elsewhere, "--model.name_or_path", address], 2),
        ([*train, *elsewhere, "--data.train", address], 2),
        ([*train, *elsewhere, "--data.train", "someone/rows"], 2),
        ([*train, *elsewhere, "--training.learning_rate", HUB], 2),
        ([*train, *elsewhere, "--model.token", TYPED], 0),  # passed over, which a line says
        ([*train, "--training.resume_from_checkpoint", "true"], 0),  # the settings are the same, but hidden
    ]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE"))}
    tokens = {"HF_TOKEN": HUB, "HUGGING_FACE_HUB_TOKEN": OLD, "WANDB_API_KEY": WANDB}
    settings = {
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "modules"), str(Path(__file__).parents[2])]),
    }
    (tmp_path / "commands.py").write_text(COMMANDS)
    printed = ""
    with serve(Hub({"someone/private": {"main": files}}, private=("someone/private",), token=HUB)) as hub:
        for home, endpoint, part in (
            ("home", hub.url, commands),
            ("empty", f"http://me:{URL}@127.0.0.1:9", [(["info", "someone/private"], 2)]),
        ):
            done = subprocess.run(
                [sys.executable, str(tmp_path / "commands.py")],
                env={**inherited, **tokens, **settings, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / home)},
                input=json.dumps(part),
                capture_output=True,
                text=True,
                check=False,
                cwd=Path(__file__).parents[2],
            )
            assert done.returncode == 0, done.stdout + done.stderr
            assert done.stdout.count("STATUS") == len(part)
            printed += done.stdout + done.stderr
    folders = [tmp_path / name for name in ("out", "evaluation", "merged", "home", "empty")]
    written = {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}
    assert {"config.yaml", "report.html", "versions.json", "wandb.json"} <= {path.name for path in written}
    assert b"REDACTED" in (tmp_path / "out" / "config.yaml").read_bytes()
    texts = {"printed": printed.encode(), **written}
    assert [(str(place), name) for place, text in texts.items() for name in CANARIES if name.encode() in text] == []
