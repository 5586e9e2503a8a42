"""The command line: what it accepts, what it prints, and how it refuses bad input."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from safetensors.numpy import load_file, save_file

from phi3_jax.cli import main
from phi3_jax.cli.run_options import RunParser, make_run, read_run
from phi3_jax.config.parse import merged
from phi3_jax.config.run import SECTIONS, RunConfig
from phi3_jax.config.sections import ModelSection
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.parallel.mesh import device_line
from tests.helpers.commands import ROW, refusal, train_arguments

PROGRAM = [sys.executable, "-c", "import sys; from phi3_jax.cli import main; sys.exit(main())"]


@pytest.fixture
def copy(base, tmp_path) -> Path:
    return shutil.copytree(base, tmp_path / "copy")


# Bad input. Each case breaks something and names words that the one line must hold.


def _remove_shard(copy: Path) -> list[str]:
    file = sorted(copy.glob("model-*.safetensors"))[1]
    file.unlink()
    return [str(copy), file.name, "missing"]


def _truncate_shard(copy: Path) -> list[str]:
    file = sorted(copy.glob("model-*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])
    return [str(copy), file.name, "cut off"]


def _reshape_tensor(copy: Path) -> list[str]:
    name = "model.layers.1.mlp.down_proj.weight"
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    file = copy / index["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = tensors[name].T.copy()
    save_file(tensors, file)
    return [str(copy), name, "[48, 32]", "[32, 48]"]


def _pickle(copy: Path) -> list[str]:
    for file in copy.glob("model*safetensors*"):
        file.unlink()
    # Would end the process, and the test, if anyone opened it.
    (copy / "pytorch_model.bin").write_bytes(b"cos\n_exit\n(I99\ntR.")
    return [str(copy), "pytorch_model.bin", "safetensors"]


def _other_model_type(copy: Path) -> list[str]:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    return ["config.json", "'llama'", "'phi3'"]


@pytest.mark.parametrize("damage", [_remove_shard, _truncate_shard, _reshape_tensor, _pickle, _other_model_type])
def test_a_damaged_checkpoint_is_refused_before_anything_is_written(damage, copy, chats, tmp_path, capfd):
    words = damage(copy)
    line = refusal(capfd, train_arguments(copy, chats, tmp_path / "out"))
    assert [word for word in words if word not in line] == []
    assert not (tmp_path / "out").exists()
    assert refusal(capfd, ["info", copy])


def test_names_of_other_models_are_answered_with_those_of_phi_3(base, chats, tmp_path, capfd):
    line = refusal(capfd, train_arguments(base, chats, tmp_path / "out", "--peft.target_modules=[query_key_value]"))
    assert "query_key_value matches nothing" in line
    assert "qkv_proj" in line
    assert "v_proj" in line
    assert not (tmp_path / "out").exists()


def test_the_names_of_llama_are_slices(base, chats, tmp_path, capfd):
    assert main(train_arguments(base, chats, tmp_path / "out", "--peft.target_modules=[v_proj, gate_proj]")) == 0
    printed = capfd.readouterr().out
    assert "model.layers.self_attn.v_proj (slice of qkv_proj)" in printed
    assert "model.layers.mlp.gate_proj (slice of gate_up_proj)" in printed
    written = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert sorted(written["target_modules"]) == ["gate_up_proj", "qkv_proj"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--peft.r=0"], ["peft.r is 0"]),
        (["--peft.init_lora_weights=loftq"], ["loftq", "model.quantization is none"]),
        (["--peft.init_lora_weights=pissa", "--model.quantization=nf4"], ["pissa", "nf4"]),
        (["--peft.full_finetuning=true", "--model.quantization=int8"], ["full_finetuning", "int8"]),
        (["--peft.use_dora=true", "--peft.lora_bias=true"], ["use_dora", "lora_bias"]),
        (["--peft.use_dora=true", "--peft.target_modules=[q_proj]"], ["use_dora", "q_proj, k_proj, v_proj"]),
        (["--peft.rank_pattern={dense: 4}"], ["rank_pattern", "dense", "matches none"]),
        (["--peft.exclude_modules=[lm_head]"], ["exclude_modules", "lm_head"]),
        (["--peft.layers_to_transform=[7]"], ["layers_to_transform has 7"]),
        (["--peft.modules_to_save=[score]"], ["modules_to_save", "score matches nothing"]),
        (["--peft.trainable_token_indices=[99999]"], ["trainable_token_indices has 99999"]),
        (["--peft.init_lora_weights=loftq", "--model.quantization=int8"], ["loftq_bits 4", "int8"]),
        (["--peft.init_lora_weights=eva", "--peft.eva_config={rho: 0.5}"], ["rho"]),
        (["--peft.init_lora_weights=corda"], ["corda", "expected"]),
        (["--training.optim=lion_8bit"], ["lion_8bit", "adamw_8bit"]),
        (["--training.loraplus_lr_ratio=0"], ["loraplus_lr_ratio"]),
        (["--training.optim=lorafa", "--training.loraplus_lr_ratio=4"], ["lorafa", "loraplus_lr_ratio"]),
    ],
)
def test_what_cannot_be_together_is_told_in_one_line(options, words, base, chats, tmp_path, capfd):
    line = refusal(capfd, train_arguments(base, chats, tmp_path / "out", *options))
    assert [word for word in words if word not in line] == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], ["no usable rows"]),
        ([{"messages": []}], ["row 1"]),
        ([ROW, {"messages": ROW["messages"][:1]}], ["row 2", "assistant"]),
        ([{"colour": "blue"}], ["colour"]),
    ],
)
def test_data_without_anything_to_learn_is_refused(rows, words, base, tmp_path, capfd):
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = refusal(capfd, train_arguments(base, file, tmp_path / "out"))
    assert [word for word in ["chats.jsonl", *words] if word not in line] == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "--training.learnin_rate", "1"], ["--training.learnin_rate", "mean --training.learning_rate?"]),
        (["train", "--trainig.seed", "1"], ["--trainig.seed", "did you mean --training.seed?"]),
        (["train", "--learning_rat", "1"], ["--learning_rat", "did you mean --training.learning_rate?"]),
        (["train", "--help", "paralel"], ["there is no section paralel", "did you mean parallel?"]),
        (["generate", "-v", "--quiet"], ["--verbose and --quiet"]),
        (["train", "--confg", "x"], ["--confg", "did you mean --config?"]),
        (["train", "--config", "absent.yaml"], ["absent.yaml", "no such file"]),
        (["train", "absent.yaml"], ["unrecognized arguments: absent.yaml", "options look like --training"]),
        (["train", "--training.max_steps"], ["--training.max_steps: expected one argument"]),
        (["train", "--training.max_steps", "--data.train", "x"], ["--training.max_steps: expected one argument"]),
        (
            ["train", "--training.max_steps", "1", "--training.max_steps.x", "1"],
            ["--training.max_steps.x", "did you mean --training.max_steps?"],
        ),
        (["train"], ["model.name_or_path is not given", "phi3-jax init", "--config RECIPE"]),
        (["train", "-q"], ["phi3-jax init"]),
        (["train", "--learning_rate", "1"], ["model.name_or_path is not given; give a checkpoint folder"]),
        (["train", "chats.jsonl"], ["unrecognized arguments: chats.jsonl", "like --data.train chats.jsonl"]),
        (["train", "--model.name_or_path", "x"], ["data.train is not set"]),
        (["trian"], ["unknown command trian", "did you mean train?"]),
        (["generate", "--mdel", "x"], ["unknown option --mdel", "--model"]),
        (["generate", "--model", "x"], ["--prompt", "required"]),
        (["generate", "--model", "no/such/folder", "--prompt", "x"], ["no/such/folder"]),
        (["evaluate", "--model", "x", "--data", "y", "--max-length", "many"], ["--max-length", "many"]),
        (["evaluate", "--model", "x", "--data", "y", "--batch-size", "0"], ["--batch-size", "at least 1"]),
        (["info"], ["PATH", "required"]),
        (["info", "no/such/folder"], ["no/such/folder"]),
        (["export", "x", "--output", "y"], ["--merge", "expected one of"]),
        (["export", "no/such/folder", "--merge", "--output", "y"], ["no/such/folder"]),
    ],
)
def test_wrong_arguments_are_told_in_one_line(argv, words, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refusal(capfd, argv)
    assert [word for word in words if word not in line] == []
    assert list(tmp_path.iterdir()) == []


def test_the_real_program_refuses_in_one_line_and_without_traceback(copy, chats, tmp_path):
    words = _truncate_shard(copy)
    argv = train_arguments(copy, chats, tmp_path / "out")
    result = subprocess.run([*PROGRAM, *argv], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert [word for word in words if word not in line] == []
    assert not (tmp_path / "out").exists()


def test_an_unexpected_error_keeps_its_traceback(monkeypatch):
    def broken(argv):
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr("phi3_jax.cli.info.run", broken)
    with pytest.raises(RuntimeError):
        main(["info", "x"])


def test_a_device_that_is_too_small_is_told_in_one_line(monkeypatch, capfd):
    def allocate(_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.\nmore\nand more")

    monkeypatch.setattr("phi3_jax.cli.train.run", allocate)
    assert main(["train"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line == (
        "phi3-jax: out of memory (RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.); `phi3-jax plan` says what "
        "fits"
    )


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FloatingPointError("step 3: not\nfinite"), "phi3-jax: step 3: not finite"),
        (PermissionError(13, "Permission denied", "/root/x"), "phi3-jax: /root/x: Permission denied"),
        (ConnectionResetError("by peer"), "phi3-jax: by peer"),
        (TimeoutError("process 1 did not answer"), "phi3-jax: process 1 did not answer"),
        (
            MemoryError("Unable to allocate 9 TiB"),
            "phi3-jax: out of memory (Unable to allocate 9 TiB)",
        ),
    ],
    ids=["numbers", "file", "network", "time", "memory"],
)
@pytest.mark.parametrize("command", ["train", "evaluate", "generate", "benchmark", "export"])
def test_what_numbers_and_machines_do_is_told_in_one_line(error, line, command, monkeypatch, capfd):
    def fail(_):
        raise error

    monkeypatch.setattr(f"phi3_jax.cli.{command}.run", fail)
    assert main([command]) == 1
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith(line)


def test_devices_that_jax_cannot_use_are_told_in_one_line(monkeypatch, capfd):
    monkeypatch.setenv("JAX_PLATFORMS", "nope")
    monkeypatch.setattr("phi3_jax.cli.train.run", lambda _: jax.devices("nope"))
    assert main(["train"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("phi3-jax: JAX cannot use the devices of JAX_PLATFORMS=nope (Unknown backend")


def test_an_interrupt_ends_with_status_130_and_one_line(monkeypatch, capfd):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("phi3_jax.cli.info.run", interrupted)
    assert main(["info", "x"]) == 130
    assert capfd.readouterr().err == "phi3-jax: interrupted\n"


# Help.


@pytest.mark.parametrize("command", ["", "demo", "data", "train", "evaluate", "generate", "chat", "export", "info"])
def test_help_is_printed_with_status_0(command, capfd):
    argv = [command, "--help"] if command else ["--help"]
    assert main(argv) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    assert "usage: phi3-jax" in captured.out


def test_every_setting_has_a_help_text(capfd):
    main(["train", "--help-all"])
    text = " ".join(capfd.readouterr().out.split())
    for words in ("--config FILE", "--training.learning_rate LEARNING_RATE Peak of the schedule.", "--peft.r R Rank"):
        assert words in text
    # An option without one shows its type right after its name.
    assert not [part for part in text.split("--")[1:] if ") " not in part and "(type:" in part.split()[1:2]]


def test_the_help_of_train_fits_a_screen_and_that_of_a_section_tells_its_keys(capfd):
    assert main(["train", "--help"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) <= 25
    assert [line for line in lines if len(line) > 100] == []
    assert [line.partition(":")[0] for line in lines if line.partition(":")[0] in SECTIONS] == list(SECTIONS)
    assert main(["help", "train", "peft"]) == 0
    out = capfd.readouterr().out
    assert "--peft.r R" in out
    assert "--training." not in out


@pytest.mark.parametrize("word", ["--version", "version"])
def test_version(word, capfd):
    assert main([word]) == 0
    assert capfd.readouterr().out.startswith("phi3-jax 0.")


# What people type, and the answer: what it is read as (values that differ from the defaults), the hint, or nothing.
SLIPS = [line.split("\t") for line in (Path(__file__).parent / "slips.tsv").read_text().splitlines()[1:]]
DEFAULTS = RunConfig(ModelSection("base")).to_dict()


@pytest.mark.parametrize(("typed", "answer"), SLIPS, ids=[typed for typed, _ in SLIPS])
def test_slips_are_understood_or_answered_with_the_right_name_or_with_none(typed, answer, capfd):
    command, *options = typed.split()
    if answer.startswith("read as"):
        raw = merged({"model": {"name_or_path": "base"}}, read_run(RunParser(command, "").parse(options)))
        found = make_run(raw).to_dict()
        changed = {
            f"{section}.{key}={value}"
            for section, values in found.items()
            for key, value in values.items()
            if value != DEFAULTS[section][key]
        }
        assert changed == set(answer.removeprefix("read as").split())
        return
    line = refusal(capfd, [command, *options])
    hint = re.search(r"did you mean (.*?)\?|give it by itself: (.*)", line)
    if answer == "nothing":
        assert hint is None
        assert "unknown" in line
    else:
        assert hint is not None
        assert answer == f"hint {hint[1] or hint[2]}"


# What the commands do.


def test_generate_answers_in_the_chat_template(base, adapter, capfd):
    arguments = ["generate", "--model", str(base), "--prompt", "2 + 2?", "--max-new-tokens", "5"]
    answers = []
    for more in ([], ["--raw"], ["--adapter", str(adapter)]):
        assert main([*arguments, *more]) == 0
        answers.append(capfd.readouterr().out)
    assert len(set(answers)) == 3


# The device is the first line; adapters are looked at before a base is loaded.


def _command(name, base, adapter, chats, out, *more) -> list[str]:
    return {
        "train": [*train_arguments(base, chats, out), f"--peft.init_from={adapter}"],
        "generate": ["generate", f"--model={base}", f"--adapter={adapter}", "--prompt=x", "--max-new-tokens=2"],
        "chat": ["chat", f"--model={base}", f"--adapter={adapter}"],
        "evaluate": ["evaluate", f"--model={base}", f"--adapter={adapter}", f"--data={chats}", "--max-length=64"],
        "export": ["export", str(adapter), "--merge", f"--base={base}", f"--output={out}"],
        "benchmark generate": ["benchmark", "generate", f"--model={base}", f"--adapter={adapter}", "--new-tokens=2"],
    }[name] + list(more)


@pytest.mark.parametrize("name", ["train", "generate", "evaluate", "export"])
def test_the_device_is_the_first_line(name, base, adapter, chats, tmp_path, capfd):
    argv = _command(name, base, adapter, chats, tmp_path / "out")
    argv += [] if name in ("train", "export") else ["--json"]
    if name == "train":
        argv = [word for word in argv if "init_from" not in word]
    capfd.readouterr()
    assert main(argv) == 0
    captured = capfd.readouterr()
    said = captured.out if name == "train" else captured.err
    assert said.splitlines()[0] == device_line()
    if "--json" in argv:
        answers = [json.loads(line) for line in captured.out.splitlines()]
        assert answers
        assert all(answers)
    if name == "generate":
        assert main([*argv, "-q"]) == 0
        assert capfd.readouterr() == (captured.out, "")
        assert main([*argv, "--verbose"]) == 0
        assert "loading" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["train", "generate", "chat", "evaluate", "export", "benchmark generate"])
def test_adapters_are_looked_at_before_a_base_is_loaded(name, base, adapter, chats, tmp_path, capfd, monkeypatch):
    def load(*_, **__):
        raise AssertionError("the weights are read")

    monkeypatch.setattr(Checkpoint, "load_model", load)
    monkeypatch.setattr("phi3_jax.hf.merge.read_tensor", load)
    monkeypatch.setattr("phi3_jax.hf.merge.read_finite", load)
    other = shutil.copytree(adapter, tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    for given, words in ((other, "tensors do not fit the model"), (tmp_path / "nowhere", "no such folder")):
        assert words in refusal(capfd, _command(name, base, given, chats, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    # What is read of the base would have been seen.
    with pytest.raises(AssertionError, match="the weights are read"):
        main(_command(name, base, adapter, chats, tmp_path / "out"))


@pytest.mark.parametrize("name", ["train", "export_peft"])
def test_scripts_are_doors_to_the_commands(name):
    script = Path(__file__).parents[2] / "scripts" / f"{name}.py"
    text = script.read_text()
    command = {"export_peft": "export"}.get(name, name)
    assert f'main(["{command}", *sys.argv[1:]])' in text
    compile(text, str(script), "exec")
