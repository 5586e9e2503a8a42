"""What the tests of benchmarks share."""

from phi3_jax.cli import main
from phi3_jax.config.model import Phi3Config
from phi3_jax.config.run import RunConfig
from phi3_jax.performance import train as benchmark

CONFIG = Phi3Config(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    sliding_window=5,
)


def seen_by_command(monkeypatch, capsys, *arguments: str) -> tuple[RunConfig, Phi3Config, dict]:
    """What the command asks for, without measuring anything."""
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "benchmark_train", lambda *args, **kwargs: asked.append((*args, kwargs)) or {})
        assert main(["benchmark", "train", "--json", *arguments]) == 0, capsys.readouterr().err
    return asked[0]
