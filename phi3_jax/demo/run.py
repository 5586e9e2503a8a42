"""The demo: a LoRA fine-tune of the packaged base model on the packaged chat set."""

from phi3_jax.config.parse import merged
from phi3_jax.config.recipes import read_recipe
from phi3_jax.config.run import RunConfig, parse_run_config


def demo_config(output_dir: str = "out/demo", seed: int = 0) -> RunConfig:
    """The demo's run, with the installed package's files."""
    # The demo may be run again and again; only what an earlier run wrote there is replaced.
    training = {"output_dir": output_dir, "seed": seed, "overwrite_output_dir": True}
    return parse_run_config(merged(read_recipe("demo"), {"training": training}))[0]
