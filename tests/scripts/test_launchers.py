"""The launch scripts: what they would run, what they refuse, and that the guide's commands are real. No network."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from phi3_jax.cli.main import COMMANDS, main
from phi3_jax.cli.run_options import RunParser, read_run
from phi3_jax.config.run import parse_run_config

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
GUIDE = (ROOT / "docs" / "tpu_vm.md").read_text(encoding="utf-8")
ALL = "gcloud compute tpus tpu-vm ssh phi3 --worker=all"
HERE = "--zone=us-west4-a"


def call(script: str, *arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Runs a script with this environment for the TPU or the job, and nothing of the machine's own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "SLURM_", "PHI3_JAX"))}
    return subprocess.run(
        [str(ROOT / "scripts" / script), *arguments], cwd=cwd, env=kept | environment, capture_output=True, text=True
    )


def tpu(*arguments: str, **settings) -> subprocess.CompletedProcess:
    return call("tpu_vm.sh", *arguments, **{"TPU_NAME": "phi3", "TPU_ZONE": "us-west4-a", **settings})


def printed(*arguments: str, **settings) -> list[list[str]]:
    """The commands of a dry run, each as the words that a shell makes of it."""
    result = tpu(*arguments, **settings)
    assert (result.returncode, result.stderr) == (0, "")
    return [shlex.split(line) for line in result.stdout.splitlines()]


def remote(words: list[str]) -> str:
    """What a printed ssh command runs on the workers."""
    return next(word for word in words if word.startswith("--command=")).removeprefix("--command=")


CREATE = "gcloud compute tpus tpu-vm create phi3 --accelerator-type="
QUEUE = "gcloud compute tpus queued-resources"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("create --type v5litepod-8", f"{CREATE}v5litepod-8 --version=v2-alpha-tpuv5-lite {HERE}"),
        ("create --spot --type v6e-4", f"{CREATE}v6e-4 --version=v2-alpha-tpuv6e --spot {HERE}"),
        (
            "create --type v5p-8 --runtime-version other --project p",
            f"{CREATE}v5p-8 --version=other {HERE} --project=p",
        ),
        (
            "create --type v5litepod-16 --queued --valid-for 6h --spot",
            f"{QUEUE} create phi3 --node-id=phi3 --accelerator-type=v5litepod-16 "
            f"--runtime-version=v2-alpha-tpuv5-lite --valid-until-duration=6h --spot {HERE}",
        ),
        ("delete", f"gcloud compute tpus tpu-vm delete phi3 --quiet {HERE}"),
        ("delete --queued --yes", f"{QUEUE} delete phi3 --force --quiet {HERE}"),
        ("stop", f"{ALL} '--command=kill -TERM -- -$(cat ~/phi3_jax/train.pid)' {HERE}"),
        (
            "logs --worker 2 --follow",
            f"gcloud compute tpus tpu-vm ssh phi3 --worker=2 '--command=tail -n 100 -f ~/phi3_jax/train.log' {HERE}",
        ),
    ],
)
def test_a_dry_run_prints_the_one_command(arguments, expected):
    command, *rest = arguments.split()
    assert printed(command, "--dry-run", *rest) == [shlex.split(expected)]


def test_several_slices_are_one_request_and_every_command_acts_on_all():
    two = {"TPU_SLICES": "2"}
    (create,) = printed("create", "--dry-run", "--type", "v5litepod-16", "--queued", **two)
    assert " ".join(create) == (
        f"{QUEUE} create phi3 --node-prefix=phi3 --node-count=2 --accelerator-type=v5litepod-16 "
        f"--runtime-version=v2-alpha-tpuv5-lite {HERE}"
    )
    nodes = [f"phi3-{number}" for number in range(2)]
    started = printed("train", "--dry-run", "--slices", "2", "--config", "a.yaml")
    assert [words[5] for words in started] == nodes
    assert len({remote(words) for words in started}) == 1
    assert [words[6] for words in printed("upload", "--dry-run", str(ROOT / "README.md"), "r.md", **two)[2:]] == [
        str(ROOT / "README.md"),
        str(ROOT / "README.md"),
    ]
    (log,) = printed("logs", "--dry-run", "--slice", "1", "--worker", "3", **two)
    assert log[5:7] == ["phi3-1", "--worker=3"]
    (fetch,) = printed("fetch", "--dry-run", "out", "here", **two)[1:]
    assert "phi3-0:phi3_jax/out" in fetch


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("create --type v5litepod-16 --slices 2", "give --queued"),
        ("delete --slices 2", "give --queued"),
        ("status --slices none", "--slices is none"),
        ("logs --slices 2 --slice 2", "--slice is 2, expected a number below 2"),
    ],
)
def test_what_slices_do_not_allow_is_told(arguments, words):
    command, *rest = arguments.split()
    result = tpu(command, "--dry-run", *rest)
    assert result.returncode == 2
    assert words in result.stderr


def test_programs_on_several_slices_are_started_together(tmp_path):
    """Each waits for the other one, as programs that find each other do."""
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(
        '#!/bin/sh\nmkfifo "$HOME/pipe" 2>/dev/null\n'
        'case $5 in phi3-0) echo go >"$HOME/pipe" ;; *) read -r word <"$HOME/pipe" && [ "$word" = go ] ;; esac\n'
    )
    gcloud.chmod(0o755)
    result = tpu("run", "true", TPU_SLICES="2", HOME=str(tmp_path), PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert (result.returncode, result.stderr) == (0, "")


def test_install_copies_a_commit_or_clones_it_on_every_worker(tmp_path):
    pack, copy, remove, install = printed("install", "--dry-run", "--ref", "v1", TMPDIR=f"{tmp_path}/a b")
    archive = f"{tmp_path}/a b/phi3_jax-phi3.tar.gz"
    assert pack == ["git", "-C", str(ROOT), "archive", "--format=tar.gz", f"--output={archive}", "v1"]
    assert copy == ["gcloud", *ALL.split()[1:4], "scp", archive, "phi3:phi3_jax.tar.gz", "--worker=all", HERE]
    assert remove == ["rm", archive]
    assert install[:6] == [*ALL.split()[:6]]
    assert "--worker=all" in install
    assert remote(install).startswith("mkdir -p ~/phi3_jax && tar -xzf ~/phi3_jax.tar.gz -C ~/phi3_jax && ")
    assert "--constraint constraints.txt --editable '.[tpu]'" in remote(install)
    (clone,) = printed("install", "--dry-run", "--git", "https://host/my repo", "--ref", "v1")
    assert remote(clone).startswith(
        "rm -rf ~/phi3_jax && git clone --quiet 'https://host/my repo' ~/phi3_jax && "
        "cd ~/phi3_jax && git checkout --quiet v1 && "
    )
    # Both end in the same installation.
    assert remote(clone).split("git checkout --quiet v1 && ")[1] == remote(install).split("cd ~/phi3_jax && ")[1]


def run_remotely(home: Path, script: str, **environment: str) -> subprocess.CompletedProcess:
    """What a worker's shell does with a command."""
    return subprocess.run(
        ["bash", "-c", script], env={**os.environ, "HOME": str(home), **environment}, capture_output=True, text=True
    )


def test_a_workers_shell_gets_the_arguments_of_train_as_they_were_given(tmp_path):
    program = tmp_path / "phi3_jax" / ".venv" / "bin" / "phi3-jax"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\nprintf "<%s>" "$@"\n')
    program.chmod(0o755)
    given = ["--config", "my configs/a.yaml", "--data.train=it's $HOME `x`", "--peft.target_modules", '["a", "b"]', ""]
    (words,) = printed("train", "--dry-run", *given)
    assert words[:7] == [*ALL.split()]
    assert run_remotely(tmp_path, remote(words)).returncode == 0
    log = tmp_path / "phi3_jax" / "train.log"
    wanted = "".join(f"<{word}>" for word in ["train", *given])
    deadline = time.monotonic() + 30
    while log.read_text() != wanted and time.monotonic() < deadline:
        time.sleep(0.02)
    assert log.read_text() == wanted
    # As long as a run is going on, here this very process, there is no second one.
    (tmp_path / "phi3_jax" / "train.pid").write_text(str(os.getpid()))
    again = run_remotely(tmp_path, remote(words))
    assert (again.returncode, again.stderr) == (1, "a run is going on; stop it first\n")
    _, ask = printed("status", "--dry-run")
    assert run_remotely(tmp_path, remote(ask)).stdout.endswith(": running\n")
    (run,) = printed("run", "--dry-run", "phi3-jax", "benchmark", "a b")
    assert run_remotely(tmp_path, remote(run)).stdout == "<benchmark><a b>"


def test_upload_and_fetch_keep_paths_with_spaces_whole(tmp_path):
    chats = tmp_path / "my chats.jsonl"
    chats.touch()
    folder, copy = printed("upload", "--dry-run", str(chats), "my data/chats.jsonl")
    assert run_remotely(tmp_path, remote(folder)).returncode == 0
    assert (tmp_path / "phi3_jax" / "my data").is_dir()
    there = ["--recurse", str(chats), "phi3:phi3_jax/my data/chats.jsonl", "--worker=all", HERE]
    assert copy == ["gcloud", "compute", "tpus", "tpu-vm", "scp", *there]
    here, back = printed("fetch", "--dry-run", "~/bucket/run 1/adapter", "my results")
    assert here == ["mkdir", "-p", "my results"]
    assert back[5:] == ["--recurse", "phi3:bucket/run 1/adapter", "my results", "--worker=0", HERE]
    (mount,) = printed("mount", "--dry-run", "gs://my-bucket")
    assert remote(mount).endswith("--metadata-cache-ttl-secs 0 my-bucket ~/bucket")


def test_delete_asks_and_leaves_the_tpu_alone_without_a_yes(tmp_path):
    gcloud = tmp_path / "gcloud"
    gcloud.write_text('#!/bin/sh\necho "gcloud $*"\n')
    gcloud.chmod(0o755)
    environment = {
        **os.environ,
        "TPU_NAME": "phi3",
        "TPU_ZONE": "us-west4-a",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    for answer, status in {"n\n": 1, "": 1, "y\n": 0}.items():
        command = [str(ROOT / "scripts/tpu_vm.sh"), "delete"]
        result = subprocess.run(command, input=answer, env=environment, capture_output=True, text=True)
        assert result.returncode == status, answer
        assert ("gcloud" in result.stdout) == (status == 0)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("craete", "unknown command craete"),
        ("create --dry-run", "create needs --type"),
        ("create --dry-run --type v5e", "--type is v5e, expected a type and a size"),
        ("create --dry-run --type v99-8", "no runtime version is known for v99-8"),
        ("create --dry-run --type v5p-8 --valid-for 6h", "--valid-for is for --queued"),
        ("create --dry-run --type", "--type needs a value"),
        ("create --dry-run --type v5p-8 more", "create takes options only"),
        ("status --dry-run --spot", "unknown option --spot of status"),
        ("logs --dry-run --worker x", "--worker is x"),
        ("upload --dry-run /no/such/file data", "/no/such/file: no such file"),
        ("upload --dry-run README.md", "upload takes LOCAL and REMOTE"),
        ("fetch --dry-run out", "fetch takes REMOTE and LOCAL"),
        ("mount --dry-run my/bucket", "my/bucket is no name of a bucket"),
        ("train --dry-run", "train needs the arguments of phi3-jax train"),
        ("train --config x --dry-run", "--dry-run stands among the arguments of train"),
        ("run --dry-run", "run needs a program"),
        ("status --dry-run --name Phi_3", "--name is Phi_3"),
        ("status --dry-run --zone mars", "--zone is mars"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(arguments, complaint):
    result = tpu(*arguments.split())
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"tpu_vm.sh: {complaint}")
    assert result.stderr.count("\n") == 1


def test_a_tpu_must_be_named():
    for name, missing in {"TPU_NAME": "no TPU is named", "TPU_ZONE": "no zone is given"}.items():
        result = tpu("status", "--dry-run", **{name: ""})
        assert (result.returncode, result.stderr.count("\n")) == (2, 1)
        assert missing in result.stderr


def test_slurm_runs_one_process_a_node_with_all_its_gpus():
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "2", "SLURM_SUBMIT_DIR": "/my clone"}
    arguments = ["--dry-run", "--config", "a b.yaml"]
    srun = "srun --nodes=2 --ntasks-per-node=1 --kill-on-bad-exit=1 '/my clone/.venv/bin/phi3-jax' train"
    assert call("slurm_train.sh", *arguments, **job).stdout == f"{srun} --config 'a b.yaml'\n"
    gpus = call("slurm_train.sh", *arguments, **job, SLURM_GPUS_ON_NODE="4", SLURM_RESTART_COUNT="1").stdout
    resume = "--training.resume_from_checkpoint true"
    assert gpus == f"env JAX_LOCAL_DEVICE_IDS=0,1,2,3 {srun} --config 'a b.yaml' {resume}\n"


@pytest.mark.parametrize(
    ("arguments", "job", "complaint"),
    [
        ([], {}, "needs the arguments of phi3-jax train"),
        (["--config", "x"], {}, "this is no SLURM job"),
        (["--config", "x", "--dry-run"], {}, "--dry-run stands among the arguments"),
        (
            ["--config", "x"],
            {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": "/nowhere"},
            "/nowhere/.venv/bin/phi3-jax: no such",
        ),
        (
            ["--dry-run", "--config", "x"],
            {"SLURM_NTASKS": "8", "SLURM_JOB_NUM_NODES": "2"},
            "the job has 8 tasks on 2 nodes",
        ),
    ],
)
def test_slurm_refuses_what_cannot_run(arguments, job, complaint):
    result = call("slurm_train.sh", *arguments, **job)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith(f"slurm_train.sh: {complaint}")


def shellcheck(*arguments: str, text: str | None = None) -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("shellcheck is not installed")
    result = subprocess.run([program, *arguments], input=text, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_the_shell_scripts_are_clean():
    assert len(SCRIPTS) >= 2
    shellcheck(*map(str, SCRIPTS))


def test_the_skypilot_task_runs_a_configuration_that_parses():
    task = yaml.safe_load((ROOT / "scripts" / "skypilot_tpu.yaml").read_text())
    assert set(task) == {"name", "workdir", "resources", "envs", "file_mounts", "setup", "run"}
    for part in ("setup", "run"):
        shellcheck("--shell=bash", "--exclude=SC2155", "-", text=task[part])
    command = (
        task["run"]
        .replace("\\\n", "")
        .split("phi3-jax ")[1]
        .replace("$CONFIG", task["envs"]["CONFIG"])
        .replace("$DATA", "x")
    )
    name, *arguments = shlex.split(command)
    assert name == "train"
    check_run(arguments)
    # What the run writes lies in the bucket.
    (mounted,) = task["file_mounts"]
    assert arguments[arguments.index("--training.output_dir") + 1].startswith(f"{mounted}/")


def check_run(arguments: list[str]) -> None:
    """That `phi3-jax train` would take these arguments, in a clone's root."""
    options = RunParser("train", "").parse([str(ROOT / a) if a.startswith("configs/") else a for a in arguments])
    run, _ = parse_run_config(read_run(options))
    assert run.data.train is not None


def guide_commands(program: str) -> list[list[str]]:
    """The guide's commands of a program, in blocks and in running text, placeholders in capitals left out."""
    blocks = re.findall(r"```\n(.*?)```", GUIDE, re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```\n.*?```", "", GUIDE, flags=re.DOTALL))
    lines = [line for text in [*blocks, *inline] for line in text.splitlines()]
    return [
        shlex.split(line.removeprefix(".venv/bin/"))
        for line in lines
        if line.removeprefix(".venv/bin/").startswith(program)
    ]


def test_every_step_of_the_guide_passes_a_dry_run(tmp_path):
    (tmp_path / "chats.jsonl").touch()
    commands = guide_commands("scripts/tpu_vm.sh ")
    assert {"create", "install", "train", "status", "logs", "fetch", "delete"} <= {words[1] for words in commands}
    for _, command, *rest in commands:
        result = tpu(command, "--dry-run", *rest, cwd=tmp_path)
        assert result.returncode == 0, (command, rest, result.stderr)
        assert "gcloud compute tpus" in result.stdout
        if command == "train":
            check_run(rest)


def test_every_command_of_the_guide_exists():
    commands = [words[1:] for words in guide_commands("phi3-jax ") if len(words) > 1]
    commands += [words[3:] for words in guide_commands("scripts/tpu_vm.sh run phi3-jax")]
    assert {words[0] for words in commands} >= {"plan", "train", "benchmark", "generate", "export"}
    for name, *arguments in commands:
        assert name in COMMANDS, name
        for key in (word for word in arguments if re.match(r"--\w+\.\w+$", word)):
            section, option = key[2:].split(".")
            assert option in read_run(RunParser("train", "").parse([key, "1"]))[section]
    for path in re.findall(r"(?:scripts|configs)/[\w./]+\w", GUIDE):
        assert (ROOT / path).exists(), path


def test_the_guides_benchmark_has_options_that_exist(capsys):
    (words,) = guide_commands("scripts/tpu_vm.sh run phi3-jax benchmark")
    # The last value counts, and is wrong: nothing else is.
    assert main([*words[3:], "--steps", "0"]) == 2
    assert "--steps: 0 is no whole number" in capsys.readouterr().err


def test_the_guides_slurm_job_would_start(tmp_path):
    (words,) = guide_commands("sbatch ")
    script = words.index("scripts/slurm_train.sh")
    assert call("slurm_train.sh", "--dry-run", *words[script + 1 :]).returncode == 0
    check_run(words[script + 1 :])
