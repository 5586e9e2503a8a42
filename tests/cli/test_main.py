"""The command line: what it accepts, what it prints, and how it refuses bad input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from phi3_jax.cli import main
from phi3_jax.config.lora import LoraConfig
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.hf.save import save_model
from phi3_jax.lora import init_lora
from phi3_jax.peft.save import save_adapter
from tests.helpers.models import tiny_model
from tests.helpers.tokenizers import JULY, phi3_tokenizer

PROGRAM = [sys.executable, "-c", "import sys; from phi3_jax.cli import main; sys.exit(main())"]
ROW = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is 4."}]}


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A whole checkpoint: a tiny random model in several shards, and a tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("checkpoint") / "base"
    tokenizer = phi3_tokenizer(JULY)
    model = tiny_model(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    save_model(model, folder, max_shard_size=40_000)
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


@pytest.fixture
def chats(tmp_path) -> Path:
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(ROW) + "\n" for _ in range(6)))
    return file


@pytest.fixture
def copy(base, tmp_path) -> Path:
    return shutil.copytree(base, tmp_path / "copy")


def train_arguments(model, data, output, *more) -> list[str]:
    return [
        "train",
        f"--model.name_or_path={model}",
        "--model.dtype=float32",
        f"--data.train={data}",
        "--data.max_length=64",
        f"--training.output_dir={output}",
        "--training.max_steps=1",
        "--training.per_device_train_batch_size=2",
        "--logging.tensorboard=false",
        *map(str, more),
    ]


def refusal(capfd, argv) -> str:
    """The one line on standard error of a command that must exit with status 2."""
    capfd.readouterr()
    assert main(list(map(str, argv))) == 2
    (line,) = capfd.readouterr().err.splitlines()
    return line


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
        (["train", "--lr", "1"], ["--lr", "did you mean --training.learning_rate?"]),
        (["train", "--trainig.seed", "1"], ["--trainig.seed", "did you mean --training.seed?"]),
        (["train", "--learning_rate", "1"], ["--learning_rate", "did you mean --training.learning_rate?"]),
        (["train", "--confg", "x"], ["--confg", "did you mean --config?"]),
        (["train", "--config", "absent.yaml"], ["absent.yaml", "cannot be read"]),
        (["train", "absent.yaml"], ["unrecognized arguments: absent.yaml", "options look like --training"]),
        (["train", "--training.max_steps"], ["--training.max_steps: expected one argument"]),
        (["train", "--training.max_steps", "--data.train", "x"], ["--training.max_steps: expected one argument"]),
        (
            ["train", "--training.max_steps", "1", "--training.max_steps.x", "1"],
            ["--training.max_steps.x", "did you mean --training.max_steps?"],
        ),
        (["train"], ["model.name_or_path is not given"]),
        (["train", "--model.name_or_path", "x"], ["data.train is not set"]),
        (["trian"], ["unknown command trian", "did you mean train?"]),
        (["generate", "--mdel", "x"], ["unknown option --mdel", "--model"]),
        (["generate", "--model", "x"], ["--prompt", "required"]),
        (["generate", "--model", "no/such/folder", "--prompt", "x"], ["no/such/folder"]),
        (["evaluate", "--model", "x", "--data", "y", "--max-length", "many"], ["--max-length", "many"]),
        (["evaluate", "--model", "x", "--data", "y", "--batch-size", "0"], ["--batch-size", "at least 1"]),
        (["info"], ["PATH", "required"]),
        (["info", "no/such/folder"], ["no/such/folder"]),
        (["export", "x", "--output", "y"], ["--merge", "required"]),
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


def test_an_interrupt_ends_with_status_130_and_one_line(monkeypatch, capfd):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("phi3_jax.cli.info.run", interrupted)
    assert main(["info", "x"]) == 130
    assert capfd.readouterr().err == "phi3-jax: interrupted\n"


# Help.


@pytest.mark.parametrize("command", ["", "demo", "train", "evaluate", "generate", "chat", "export", "info"])
def test_help_is_printed_with_status_0(command, capfd):
    argv = [command, "--help"] if command else ["--help"]
    assert main(argv) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    assert "usage: phi3-jax" in captured.out


def test_every_setting_has_a_help_text(capfd):
    main(["train", "--help"])
    text = " ".join(capfd.readouterr().out.split())
    for words in ("--config FILE", "--training.learning_rate LEARNING_RATE Peak of the schedule.", "--peft.r R Rank"):
        assert words in text
    # An option without one shows its type right after its name.
    assert not [part for part in text.split("--")[1:] if ") " not in part and "(type:" in part.split()[1:2]]


def test_version(capfd):
    assert main(["--version"]) == 0
    assert capfd.readouterr().out.startswith("phi3-jax 0.")


# What the commands do.


def test_the_command_line_wins_over_the_files_and_a_later_file_over_an_earlier(tmp_path, capfd):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("model:\n  name_or_path: a\ntraining:\n  max_steps: 1\n  seed: 1\n  logging_steps: 1\n")
    second.write_text("training:\n  max_steps: 2\n  seed: 2\n")
    argv = ["train", "--training.seed", "3", f"--config={first}", "--config", str(second), "--print_config"]
    assert main([*argv, "--data.columns.prompt=q", "--training.bf16", "true", "--training.log_level", "info"]) == 0
    captured = capfd.readouterr()
    printed = yaml.safe_load(captured.out)
    assert printed["model"]["name_or_path"] == "a"
    assert printed["model"]["dtype"] == "bfloat16"
    assert {name: printed["training"][name] for name in ("max_steps", "seed", "logging_steps")} == {
        "max_steps": 2,
        "seed": 3,
        "logging_steps": 1,
    }
    assert printed["data"]["columns"] == {"prompt": "q"}
    assert captured.err == "has no meaning in JAX, ignored: training.log_level\n"


@pytest.fixture(scope="session")
def adapter(base, tmp_path_factory) -> Path:
    """An adapter that changes the model, since both its matrices are random."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model = Checkpoint.open(base).load_model(dtype="float32")
    lora = init_lora(model, LoraConfig(r=4, init_lora_weights=False), jax.random.key(1))
    save_adapter(folder, lora, base_model_name_or_path=str(base))
    return folder


def test_a_run_trains_refuses_a_second_time_and_shows_what_it_wrote(base, chats, tmp_path, capfd):
    out = tmp_path / "out"
    argv = train_arguments(base, chats, out)
    assert main(argv) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    line = refusal(capfd, argv)
    assert str(out) in line
    assert "training.resume_from_checkpoint" in line
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    # The run's own configuration is one to start from.
    assert main(["train", "--config", str(out / "config.yaml"), f"--training.output_dir={tmp_path / 'again'}"]) == 0
    capfd.readouterr()
    assert main(["info", str(out), "--json"]) == 0
    (found,) = json.loads(capfd.readouterr().out)["adapters"]
    assert found["r"] == 16
    assert found["base_model_name_or_path"] == str(base)


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


def test_generate_answers_in_the_chat_template(base, adapter, capfd):
    arguments = ["generate", "--model", str(base), "--prompt", "2 + 2?", "--max-new-tokens", "5"]
    answers = []
    for more in ([], ["--raw"], ["--adapter", str(adapter)]):
        assert main([*arguments, *more]) == 0
        answers.append(capfd.readouterr().out)
    assert len(set(answers)) == 3


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


def test_export_writes_what_base_and_adapter_do_together(base, adapter, chats, tmp_path, capfd):
    merged = tmp_path / "deep" / "merged"
    assert main(["export", str(adapter), "--merge", "--output", str(merged), "--base-dtype", "float32"]) == 0
    losses = []
    for model in (["--model", str(base), "--adapter", str(adapter)], ["--model", str(merged)]):
        capfd.readouterr()
        assert main(["evaluate", *model, "--data", str(chats), "--max-length", "64", "--json"]) == 0
        losses.append(json.loads(capfd.readouterr().out)["eval_loss"])
    # Float32 sums in another order: W + sBA first, or the two products apart.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert (merged / "tokenizer.json").is_file()
    assert [path.name for path in merged.parent.iterdir()] == ["merged"]
    line = refusal(capfd, ["export", adapter, "--merge", "--output", merged])
    assert str(merged) in line


@pytest.mark.parametrize("name", ["train", "export_peft"])
def test_scripts_are_doors_to_the_commands(name):
    script = Path(__file__).parents[2] / "scripts" / f"{name}.py"
    text = script.read_text()
    command = {"export_peft": "export"}.get(name, name)
    assert f'main(["{command}", *sys.argv[1:]])' in text
    compile(text, str(script), "exec")
