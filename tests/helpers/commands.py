"""What the tests of commands share."""

from phi3_jax.cli import main
from phi3_jax.parallel.mesh import device_line

ROW = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is 4."}]}


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
    (line,) = after_device(capfd.readouterr().err).splitlines()
    return line


def after_device(said: str) -> str:
    """What a command says behind the line on its device, which is the first where there is one."""
    return said.removeprefix(device_line() + "\n")
