"""Configuration files, options and places to write that cannot be: each refused in one line, nothing left behind."""

import subprocess
import sys

import pytest

from tests.helpers.commands import after_device
from tests.helpers.worlds import CONFIG, cut, entries, linked, pipe, refusal, text, words_missing

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
FILES = [
    ("no file", None, "run.yaml | cannot be read"),
    ("bytes", b"\xff\xfe\x00", "run.yaml | is not UTF-8"),
    ("no YAML", "a: [", "run.yaml | is not YAML"),
    ("a control character", "model: \x1b", "run.yaml | is not YAML"),
    ("a list", "- a\n", "run.yaml | holds a list"),
    ("nesting without end", "[" * 5000, "run.yaml | nested too deep"),
    ("aliases that multiply", BOMB, "run.yaml | aliases written out"),
    ("an alias in itself", "model: &m {a: *m}", "run.yaml | an alias stands within what it names"),
    ("code", "model: !!python/object/apply:os.system [exit 9]", "run.yaml | is not YAML"),
    ("a day that is none", "model: {name_or_path: 2024-13-45}", "run.yaml | is not YAML"),
    ("a number of 5,000 digits", f"training: {{seed: {'9' * 5000}}}", "run.yaml | is too large"),
    ("a key twice", "training: {seed: 1}\ntraining: {max_steps: 2}\n", "run.yaml | 'training' stands twice, line 2"),
    ("300 KiB", "#" * 300_000, "run.yaml | is larger than 0.25 MiB"),
    ("an unknown section", "modle: {}", "modle | did you mean model"),
    ("a section of numbers", "peft: 3", "peft is 3"),
    ("a key that is a list", "? [a]\n: 1\n", "run.yaml | is not YAML"),
    ("a key that is a number", "training: {7: 1}", "training.7"),
    ("a name of lists", "model: {name_or_path: [a]}", "model.name_or_path"),
    ("no learning rate", "training: {learning_rate: .nan}", "training.learning_rate"),
    ("a learning rate of text", "training: {learning_rate: fast}", "training.learning_rate is 'fast'"),
    ("steps of 1.5", "training: {max_steps: 1.5}", "training.max_steps is 1.5"),
    ("an infinite weight decay", "training: {weight_decay: .inf}", "training.weight_decay"),
    ("a batch of 0", "training: {per_device_train_batch_size: 0}", "training.per_device_train_batch_size"),
    ("rows of -1 tokens", "data: {max_length: -1}", "data.max_length"),
    ("columns of lists", "data: {columns: [a]}", "data.columns"),
    ("flags of text", "training: {bf16: '[[['}", "training.bf16"),
    ("targets without end", "peft: {target_modules: '(\\w|.)+[!?]'}", "peft.target_modules | for ever"),
    ("a rank of 10^400", f"peft: {{lora_alpha: 1{'0' * 38}e400}}", "peft.lora_alpha"),
    ("a mesh of 0", "parallel: {data: 0}", "parallel.data"),
]


@pytest.mark.parametrize("command", ["train", "plan", "benchmark train"])
@pytest.mark.parametrize(("content", "words"), [case[1:] for case in FILES], ids=[case[0] for case in FILES])
def test_config_file(command, content, words, world, capfd):
    if content is not None:
        text("run.yaml", content)(world.root)
    argv = [*world.argv(command), "--config", str(world.root / "run.yaml")]
    # What stands on the command line would win over the file.
    keys = [part.split(":")[0] for part in words.split(" ") if "." in part and not part.startswith("run.yaml")]
    argv = [part for part in argv if not any(part.startswith(f"--{key}=") for key in keys)]
    assert words_missing(refusal(argv, capfd, world.root), words) == []


OPTIONS = [
    ("train", ["--training.max_steps=\x1b[31m"], r"training.max_steps | \x1b[31m"),
    ("train", ["--model.quantization_config=[[["], "model.quantization_config"),
    ("train", ["--peft.rank_pattern={"], "peft.rank_pattern"),
    ("train", ["--data.split=none_such", "--data.eval_fraction=2"], "data.eval_fraction"),
    ("train", [f"--model.name_or_path={'a' * 5000}"], "not a path that can be read"),
    ("train", ["--model.name_or_path=~nosuchuser/x"], "~nosuchuser/x"),
    ("train", ["--model.name_or_path=a\x1b]0;b\x07"], r"a\x1b]0;b\x07"),
    ("train", ["--data.train=\u202egnp.exe"], r"\u202egnp.exe"),
    ("train", [f"--training.output_dir={'a' * 5000}"], "training.output_dir"),
    ("train", ["--training.output_dir=chats.jsonl/x"], "chats.jsonl is a file"),
    ("train", ["--data.columns.x=y"], "data.columns | 'x'"),
    ("evaluate", ["--output_dir", "chats.jsonl"], "chats.jsonl is a file"),
    ("evaluate", ["--output_dir", "a" * 5000], "output_dir"),
    ("evaluate", ["--metrics", "rogue"], "rogue | did you mean rouge"),
    ("evaluate", ["--metrics", "regex=(("], "regex | no regular expression"),
    ("evaluate", ["--metrics", "json_schema=none.json"], "none.json"),
    ("evaluate", ["--adapter", "x=no/where"], "no/where"),
    ("evaluate", ["--merged", "\x1b=no/where"], "no/where"),
    ("evaluate", ["--columns", "a"], "--columns"),
    ("generate", ["--temperature", "-1"], "temperature is -1"),
    ("generate", ["--top-p", "nan"], "top_p is nan"),
    ("generate", ["--seed", "9" * 5000], "--seed"),
    ("generate", ["--output", "no/such/folder/x"], "no/such/folder"),
    ("generate", ["--stream"], "--stream"),
    ("generate", ["--adapter", "base=adapter"], "base"),
    ("chat", ["--system", "\udcff"], "not UTF-8"),
    ("chat", ["--adapter", "none"], "--adapter none"),
    ("export", ["--output", "chats.jsonl"], "chats.jsonl | exists already"),
    ("export", ["--output", "chats.jsonl/x/y"], "chats.jsonl"),
    ("export", ["--portable"], "--portable"),
    ("plan", ["--topology", "gpu:h9000"], "gpu:h9000"),
    ("plan", ["--topology", "v5e:0x0"], "v5e:0x0"),
    ("benchmark train", ["--steps", "0"], "--steps"),
    ("benchmark train", ["--hidden", "32"], "--hidden"),
    ("benchmark", ["--batch", "9" * 5000], "--batch"),
    ("benchmark", ["--model", "no/where"], "no/where"),
    ("info", ["--revision", "x", "--jsn"], "--jsn | --json"),
]


@pytest.mark.parametrize(
    ("command", "more", "words"), OPTIONS, ids=lambda value: None if isinstance(value, str) else ""
)
def test_option(command, more, words, world, capfd):
    assert words_missing(refusal(world.argv(command, *more), capfd, world.root), words) == []


PLACES = [
    (["demo", "--output_dir", "chats.jsonl"], "chats.jsonl is a file"),
    (["demo", "--seed", "many"], "--seed | many"),
    (["info", "a" * 5000], "not a path that can be read"),
    (["info", "chats.jsonl"], "chats.jsonl | is a file"),
    (["info", "empty"], "empty | no config.json and no adapter"),
    (["export", "chats.jsonl", "--merge", "--output", "out"], "chats.jsonl | is a file"),
    (["export", "base", "--merge", "--output", "out"], "adapter_config.json"),
    (["\x1b[31m"], r"unknown command \x1b[31m"),
]


@pytest.mark.parametrize(("argv", "words"), PLACES, ids=range(len(PLACES)))
def test_place(argv, words, world, capfd):
    (world.root / "empty").mkdir()
    assert words_missing(refusal(argv, capfd, world.root), words) == []


LEFT_THERE = [
    ("train", {"config.yaml": "a: 2024-13-45", "checkpoints/1/x": ""}, "config.yaml | cannot be read"),
    ("train", {"config.yaml": BOMB, "checkpoints/1/x": ""}, "config.yaml | cannot be read"),
    ("evaluate", {"config.yaml": "a: 2024-13-45"}, "config.yaml | is not YAML"),
    ("evaluate", {"config.yaml": "[" * 5000}, "config.yaml | nested too deep"),
    ("evaluate", {"config.yaml": "model: {}"}, "another kind of run"),
    ("evaluate", {"predictions/base.jsonl": "x"}, "no config.yaml"),
    ("export", {"x": ""}, "out | exists already"),
]


@pytest.mark.parametrize(("command", "files", "words"), LEFT_THERE, ids=range(len(LEFT_THERE)))
def test_what_lies_in_the_output_folder(command, files, words, world, capfd):
    for name, content in files.items():
        (world.out / name).parent.mkdir(parents=True, exist_ok=True)
        (world.out / name).write_text(content)
    more = ["--training.resume_from_checkpoint=true"] if command == "train" else []
    assert words_missing(refusal(world.argv(command, *more), capfd, world.root), words) == []


HARNESS = [
    (["--num_fewshot", "many"], "--num_fewshot | many"),
    (["--limit", "all"], "--limit | all"),
    ([], "none_such"),
]


@pytest.mark.slow  # the harness takes seconds to import
@pytest.mark.parametrize(("more", "words"), HARNESS, ids=["option", "limit", "task"])
def test_harness(more, words, world, capfd):
    pytest.importorskip("lm_eval")
    assert words_missing(refusal(world.argv("lm-eval", *more), capfd, world.root), words) == []


DOORS = [
    ("train", cut("model.safetensors", 3000), "model.safetensors"),
    ("generate", text("tokenizer.json", '{"added_tokens": [{"id": -1}]}'), "tokenizer cannot be read"),
    ("info", entries(CONFIG, model_type="\x1b[2J"), r"\x1b[2J"),
    ("evaluate", pipe(CONFIG), "no regular file"),
    ("export", linked("tokenizer.json", "/dev/zero"), "/dev/zero"),
]


@pytest.mark.parametrize(("command", "damage", "words"), DOORS, ids=[case[0] for case in DOORS])
def test_the_real_program(command, damage, words, world):
    damage(world.base)
    program = [sys.executable, "-c", "import sys; from phi3_jax.cli import main; sys.exit(main())"]
    result = subprocess.run([*program, *world.argv(command)], capture_output=True, check=False, timeout=120)
    assert result.returncode == 2
    assert after_device(result.stdout.decode()) == ""
    (line,) = after_device(result.stderr.decode()).splitlines()
    assert line.isprintable()
    assert words_missing(line, words) == []
    assert not world.out.exists()
