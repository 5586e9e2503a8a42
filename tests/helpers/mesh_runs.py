"""Runs on meshes of simulated devices, as processes of their own where the file is run."""

import json
import os
import sys
from pathlib import Path

from phi3_jax.cli.main import main
from phi3_jax.config.run import RunConfig
from phi3_jax.training.loop import train
from tests.helpers import runs
from tests.helpers.models import tiny_model
from tests.helpers.rows import write_chats
from tests.helpers.tokenizers import tiny_tokenizer

ROWS = 8  # of a step, over all devices


def write_inputs(folder: Path) -> None:
    """A model whose heads, widths and rows every mesh of 8 devices divides, and packed chats for it."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 64, "sliding_window": 20}
    tiny_model(2, bos_token_id=1, eos_token_id=2, **heads).save_pretrained(str(folder / "base"))
    tiny_tokenizer().save_pretrained(folder / "base")
    write_chats(folder / "chats.jsonl", number=60)
    write_chats(folder / "eval.jsonl", number=5, seed=1)


def config(folder: Path, mesh: list[int], output: str, **training: object) -> RunConfig:
    """Six steps of the same rows on any mesh (data, fsdp, tensor, context)."""
    each = ROWS // (mesh[0] * mesh[1])
    # Where devices share a row, what they have of it is cut besides.
    training = {"chunk_mlp": 2 if mesh[3] > 1 else "auto", **training}
    settings = {"per_device_train_batch_size": each, "per_device_eval_batch_size": each, "logging_steps": 1}
    schedule = {"gradient_accumulation_steps": 1, "eval_steps": None, "save_steps": 3, **training}
    run = runs.run_config(folder, output, training={**settings, **schedule}, data={"packing": True})
    parallel = dict(zip(("data", "fsdp", "tensor", "context"), mesh, strict=True))
    return RunConfig.from_dict({**run.to_dict(), "parallel": parallel})


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in runs.metrics(folder) if "loss" in row]


if __name__ == "__main__":
    inputs, meshes = Path(sys.argv[1]), json.loads(sys.argv[2])
    if len(sys.argv) == 3:
        for mesh in meshes:
            train(config(inputs, mesh, "_".join(map(str, mesh))))
    else:  # by the command line, as one of several processes; what is left are options
        # A file for each process, so that none reads what another is just writing.
        own = inputs / f"run-{os.environ.get('JAX_PROCESS_ID', '0')}.yaml"
        own.write_text(config(inputs, meshes[0], "hosts").to_yaml())
        sys.exit(main(["train", "--config", str(own), *sys.argv[3:]]))
