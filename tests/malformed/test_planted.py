"""Planted pickles, planted Python and planted templates: whatever names them, no command runs them."""

import io
import json
import pickle
import shutil
from pathlib import Path

import pytest

from phi3_jax.cli import main
from tests.helpers.worlds import CONFIG, World, contents, entries, write_world

PICKLES = (
    "pytorch_model.bin",
    "model.pt",
    "adapter_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "random_states_0.pkl",
    "tokenizer.pkl",
    "vocab.pkl",
)
CODE = ("modeling_phi3.py", "configuration_phi3.py", "tokenization_phi3.py", "__init__.py", "base.py", "dataset.py")
AUTO_MAP = {
    "AutoConfig": "configuration_phi3.Phi3Config",
    "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    "AutoTokenizer": ["tokenization_phi3.Phi3Tokenizer", "tokenization_phi3.Phi3Tokenizer"],
}


class Planted:
    """Its pickle writes a file once it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return _write, (str(self.mark),)


def _write(mark: str) -> None:
    Path(mark).write_text("has run")


def plant(folder: Path, mark: Path) -> None:
    """Pickles and Python files that leave `mark`, beside what is there, and configurations that name them."""
    for name in PICKLES:
        (folder / name).write_bytes(pickle.dumps(Planted(mark)))
    for name in CODE:
        (folder / name).write_text(f"from pathlib import Path\nPath({str(mark)!r}).write_text('has run')\n")
    for name, more in (
        (CONFIG, {}),
        ("tokenizer_config.json", {"tokenizer_class": "Phi3Tokenizer"}),
        ("adapter_config.json", {"auto_mapping": {"base_model_class": "X", "parent_library": "modeling_phi3"}}),
    ):
        if (folder / name).exists():
            trusts = {} if name.startswith("adapter") else {"auto_map": AUTO_MAP, "trust_remote_code": True}
            entries(name, **trusts, **more)(folder)
    (folder / "modules.json").write_text('[{"path": "", "type": "modeling_phi3.Planted"}]')


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> World:
    """Every folder that a command reads has them; `mark`, beside it, is what they would leave."""
    root = tmp_path_factory.mktemp("planted") / "world"
    world = write_world(root)
    mark = root.parent / "mark"
    for folder in (world.base, world.adapter):
        plant(folder, mark)
    rows = root / "rows"
    rows.mkdir()
    shutil.move(world.chats, rows / "train.jsonl")
    plant(rows, mark)
    (rows / "rows.py").write_text(f"open({str(mark)!r}, 'w')\n")  # as a script of the folder's name
    (rows / "train.pkl").write_bytes(pickle.dumps(Planted(mark)))
    (root / "chats.jsonl").symlink_to(rows)  # where the commands look
    pickle.loads(pickle.dumps(Planted(mark)))
    assert mark.read_text() == "has run"  # so it would show
    mark.unlink()
    return world


def test_nothing_planted_has_run_by_any_command(planted, monkeypatch, capfd):
    mark = planted.root.parent / "mark"
    monkeypatch.chdir(planted.base)  # where Python would find the modules by their names
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\n"))
    before = contents(planted.root)
    for command, more in (
        ("info", ["--json"]),
        ("info adapter", []),
        ("train", []),
        ("train on", [f"--training.output_dir={planted.root / 'on'}"]),
        ("evaluate adapter", ["--max-length", "32"]),
        ("generate adapter", ["--max-new-tokens", "2"]),
        ("chat adapter", ["--max-new-tokens", "2"]),
        ("export", ["--output", str(planted.root / "merged")]),
        ("portable", ["--output", str(planted.root / "portable")]),
        ("plan", []),
        ("benchmark adapter", ["--new-tokens", "2", "--prompt", "2", "--rounds", "1"]),
    ):
        if command == "evaluate adapter":  # where training wrote
            more = [*more, "--output_dir", str(planted.root / "evaluated")]
        assert main(planted.argv(command, *more)) == 0, capfd.readouterr().err
        assert not mark.exists(), f"{command} has run what was planted"
    after = contents(planted.root)
    assert {name: after[name] for name in before} == before
    written = [path for path in planted.root.rglob("*") if path.suffix in (".py", ".bin", ".pt", ".pth", ".pkl")]
    assert {path.parent.name for path in written} == {"base", "adapter", "rows"}  # nothing of it went along
    assert "auto_map" not in json.loads((planted.root / "merged" / CONFIG).read_text())


def test_a_tokenizer_that_only_code_could_make_is_refused(planted, tmp_path, capfd):
    folder = shutil.copytree(planted.base, tmp_path / "base")
    (folder / "tokenizer.json").unlink()
    for more in ({}, {"tokenizer.model": b"x"}):
        for name, content in more.items():
            (folder / name).write_bytes(content)
        assert main(["generate", "--model", str(folder), "--prompt", "a"]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert "tokenizer" in line
        assert not (planted.root.parent / "mark").exists()


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.pt"])
def test_weights_that_are_only_pickles_are_refused(weights, planted, tmp_path, capfd):
    folder = shutil.copytree(planted.base, tmp_path / "base")
    (folder / "model.safetensors").unlink()
    for name in PICKLES:
        if name != weights:
            (folder / name).unlink()
    assert main(["generate", "--prompt", "a", "--model", str(folder)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert weights in line
    assert "pickles" in line
    assert not (planted.root.parent / "mark").exists()
