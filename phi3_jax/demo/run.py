"""The demo: a LoRA fine-tune of the packaged base model on the packaged chat set."""

from phi3_jax.config.parse import merged, read_yaml
from phi3_jax.config.run import RunConfig, parse_run_config
from phi3_jax.demo import demo_path


def demo_config(output_dir: str = "out/demo", seed: int = 0) -> RunConfig:
    """The demo's run, with the installed package's files."""
    here = {
        "model": {"name_or_path": str(demo_path("base"))},
        "data": {name: str(demo_path(f"orders_{name}.jsonl")) for name in ("train", "eval")},
        # The demo may be run again and again; only what an earlier run wrote there is replaced.
        "training": {"output_dir": output_dir, "seed": seed, "overwrite_output_dir": True},
    }
    return parse_run_config(merged(read_yaml(demo_path("demo.yaml")), here))[0]
