"""A run that continues an adapter trains that adapter: what contradicts it is refused, and what is told is its own."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import pytest
import yaml

from phi3_jax import InputError, LoraConfig
from phi3_jax.cli import main
from phi3_jax.config.run import RunConfig
from phi3_jax.config.sections import ModelSection, PeftSection
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.lora import init_lora
from phi3_jax.peft.continued import as_trained, open_run_base
from phi3_jax.peft.save import save_adapter
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.models import random_lora, tiny_model
from tests.helpers.rows import write_chats

ADAPTERS = {
    "plain": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"},
    "slices": {
        "r": 2,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"v_proj": 4},
        "use_rslora": True,
    },
    "pissa": {"r": 2, "init_lora_weights": "pissa", "target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base, rows, and adapters of it."""
    folder = tmp_path_factory.mktemp("continued")
    write_checkpoint(folder / "base", layers=2)
    write_chats(folder / "chats.jsonl", number=4)
    model = Checkpoint.open(folder / "base").load_model(dtype="float32")
    for name, settings in ADAPTERS.items():
        lora = init_lora(model, LoraConfig(**settings), jax.random.key(0))
        save_adapter(folder / name, jax.tree.map(lambda leaf: leaf + 0.01, lora))
    return folder


def trained(folder: Path, name: str, **peft: object) -> tuple[PeftSection, list[str]]:
    raw = {"model": {"name_or_path": str(folder / "base")}, "peft": {"init_from": str(folder / name), **peft}}
    run = RunConfig.from_dict(raw)
    found, notices = as_trained(run, open_run_base(run))
    return found.peft, notices


def test_what_nobody_gave_is_as_the_adapter_has_it(folder):
    peft, notices = trained(folder, "plain")
    assert (peft.r, peft.lora_alpha, peft.lora_dropout, notices) == (4, 8, 0.1, [])
    assert set(peft.target_modules) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    peft, _ = trained(folder, "pissa")
    assert (peft.r, peft.init_lora_weights, peft.modules_to_save) == (4, True, ("lm_head",))  # as it was written


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("plain", ADAPTERS["plain"]),
        ("plain", {"r": "4", "target_modules": "[o_proj, qkv_proj, mlp.gate_up_proj, down_proj]"}),
        ("plain", {"target_modules": ".*_proj", "rank_pattern": {"o_proj": 4}, "init_lora_weights": True}),
        ("slices", ADAPTERS["slices"]),
        ("slices", {"r": 4, "rank_pattern": {"q_proj": 2, "down_proj": 2}}),
    ],
)
def test_what_says_the_same_in_other_words_is_no_contradiction(folder, name, given):
    peft, _ = trained(folder, name, **given)
    assert peft == trained(folder, name)[0]
    again = RunConfig(ModelSection(str(folder / "base")), peft)  # as config.yaml has it
    assert as_trained(again, open_run_base(again)) == (again, [])


@pytest.mark.parametrize(
    ("name", "given", "told"),
    [
        ("plain", {"r": 16}, r"peft\.r is 16 \(there 4\);"),  # the usual value, and given all the same
        ("plain", {"lora_alpha": 8, "use_rslora": True}, r"but peft\.use_rslora is True \(there False\);"),
        ("plain", {"target_modules": ["qkv_proj"]}, r"target_modules is \['qkv_proj'\] \(there \['down_proj', .*\]\);"),
        ("plain", {"layers_to_transform": [0]}, r"peft\.layers_to_transform is \[0\] \(there None\)"),
        ("plain", {"target_modules": ["nothing"]}, r"peft\.target_modules is \['nothing'\]"),
        ("plain", {"use_dora": True, "modules_to_save": ["lm_head"]}, r"use_dora is True.*modules_to_save is \['lm_"),
        ("slices", {"r": 4}, r"peft\.r is 4 \(there 2\)"),
        ("slices", {"rank_pattern": None}, r"peft\.rank_pattern is None \(there \{'v_proj': 4\}\)"),
        ("pissa", {"r": 2, "init_lora_weights": "pissa"}, r"r is 2 \(there 4\), peft\.init_lora_weights is pissa \(th"),
    ],
)
def test_a_contradiction_is_refused_with_both_values(folder, name, given, told):
    with pytest.raises(InputError, match=told):
        trained(folder, name, **given)


def test_another_dropout_counts_from_here_on_and_that_is_said(folder):
    peft, notices = trained(folder, "plain", lora_dropout=0.3)
    assert (peft.lora_dropout, peft.r) == (0.3, 4)
    (notice,) = notices
    assert notice == f"peft.lora_dropout is 0.3 from here on; {folder / 'plain'} was trained with 0.1"


def test_of_a_run_made_in_python_what_is_unusual_was_given(folder):
    run = RunConfig(ModelSection(str(folder / "base")), PeftSection(init_from=str(folder / "plain")))
    base = open_run_base(run)
    assert as_trained(run, base)[0].peft.r == 4
    with pytest.raises(InputError, match=r"peft\.r is 3 \(there 4\)"):
        as_trained(replace(run, peft=replace(run.peft, r=3)), base)
    run = RunConfig.from_dict({"model": {"name_or_path": "base"}, "peft": {"init_from": str(folder / "plain")}})
    with pytest.raises(InputError, match=r"peft\.r is 3 \(there 4\)"):
        as_trained(run.changed({"peft.r": 3}), base)


def test_files_and_the_command_line_tell_of_what_was_trained(folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "plain", tmp_path / "first" / "adapter")
    (tmp_path / "run.yaml").write_text("peft:\n  r: 16\n")
    argv = ["train", f"--model.name_or_path={folder / 'base'}", "--model.dtype=float32", "--training.max_steps=2"]
    argv += [f"--data.train={folder / 'chats.jsonl'}", "--data.max_length=32", "--logging.tensorboard=false"]
    argv += ["--peft.init_from=first", "--training.output_dir=out"]
    assert main([*argv, "--config=run.yaml"]) == 2
    assert "peft.r is 16 (there 4)" in capfd.readouterr().err
    assert main(["plan", "--topology=cpu", "--estimate", *argv[1:], "--peft.use_dora=true"]) == 2
    assert "peft.use_dora is True (there False)" in capfd.readouterr().err
    assert main([*argv, "--peft.lora_dropout=0.2"]) == 0
    assert "peft.lora_dropout is 0.2 from here on; first was trained with 0.1" in capfd.readouterr().out
    peft = yaml.safe_load(Path("out/config.yaml").read_text())["peft"]
    written = json.loads(Path("out/adapter/adapter_config.json").read_text())
    for name, value in {"r": 4, "lora_alpha": 8, "lora_dropout": 0.2}.items():
        assert (peft[name], written[name]) == (value, value)
    assert "| dropout in training | 0.2 |" in Path("out/adapter/README.md").read_text()
    assert "rank 4, α 8 on" in Path("out/report.html").read_text()
    resume = ["--training.resume_from_checkpoint=true", "--training.max_steps=2"]
    assert main(["train", "--config=out/config.yaml", *resume]) == 0


def test_ends_that_were_trained_as_one_are_not_continued(tmp_path):
    tiny_model(layers=1, tie_word_embeddings=True).save_pretrained(str(tmp_path / "base"))
    model = Checkpoint.open(tmp_path / "base").load_model(dtype="float32")
    save_adapter(tmp_path / "it", random_lora(model, target_modules=["o_proj", "embed_tokens", "lm_head"]))
    raw = {"model": {"name_or_path": str(tmp_path / "base")}, "peft": {"init_from": str(tmp_path / "it")}}
    run = RunConfig.from_dict(raw)
    as_trained(run, open_run_base(run))
    file = tmp_path / "it" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"ensure_weight_tying": True}))
    with pytest.raises(InputError, match=r"lm_head and model\.embed_tokens train as one.*they would part"):
        as_trained(run, open_run_base(run))
