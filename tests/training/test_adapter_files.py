"""The adapter beside a run's state: a copy, in files that say what the run's end says."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from phi3_jax import InputError
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.lora import partition, trainable_mask
from phi3_jax.peft.adapter import PeftAdapter
from phi3_jax.system.manifest import check, write_manifest
from phi3_jax.training.adapter_files import RunAdapter
from phi3_jax.training.loop import train
from tests.helpers.models import random_lora, tiny_model
from tests.helpers.runs import run_config, write_inputs
from tests.helpers.tokenizers import tiny_tokenizer


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """A run of two steps whose last checkpoint is of the state that its adapter is of."""
    folder = write_inputs(tmp_path_factory.mktemp("run"))
    steps = {"max_steps": 2, "save_steps": 1, "eval_strategy": "no", "eval_generations": 0}
    train(run_config(folder, training=steps, data={"eval": None}))
    return folder / "out"


def test_what_lies_beside_is_a_copy_that_no_step_changes():
    model = tiny_model(layers=1)
    lora = random_lora(model, init_lora_weights="pissa", r=2)
    whole = {"model": None, "lora": lora}
    trainable, frozen = partition(whole, {"model": None, "lora": trainable_mask(model, lora)["lora"]})
    job = SimpleNamespace(frozen=frozen, tokenizer=tiny_tokenizer(), revision=None)
    beside = RunAdapter(run_config(Path("nowhere")), job).beside(trainable)
    assert jax.tree.structure(beside.lora) == jax.tree.structure(lora)  # with PiSSA's start, which does not train
    assert all(isinstance(leaf, np.ndarray) and leaf.flags.owndata for leaf in jax.tree.leaves(beside.lora))
    assert RunAdapter(run_config(Path("nowhere")), job).beside({"model": None, "lora": None}) is None


def test_a_checkpoint_holds_the_files_of_the_adapter_and_lists_them(out):
    end, checkpoint = out / "adapter", out / "checkpoints" / "2"
    names = {path.name for path in end.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= names
    for name in names:
        assert (checkpoint / name).read_bytes() == (end / name).read_bytes(), name
    assert names <= json.loads((checkpoint / "manifest.json").read_text())["files"].keys()
    check(checkpoint, thoroughly=True)
    one, two = (load_file(out / "checkpoints" / step / "adapter_model.safetensors") for step in ("1", "2"))
    assert any(not np.array_equal(one[name], two[name]) for name in one)


def test_a_damaged_adapter_in_a_checkpoint_is_refused(out):
    weights = out / "checkpoints" / "1" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(
        InputError, match=r"checkpoints/1: the checkpoint is damaged \(adapter_model.safetensors is not"
    ):
        PeftAdapter.open(weights.parent)
    weights.write_bytes(content)
    assert PeftAdapter.open(weights.parent).config.r == 2


def test_the_state_alone_is_the_same_adapter(out, tmp_path):
    """As checkpoints were that the version before wrote."""
    run = shutil.copytree(out, tmp_path / "run", ignore=shutil.ignore_patterns("adapter*"))
    checkpoint = run / "checkpoints" / "2"
    write_manifest(checkpoint)
    model = Checkpoint.open(out.parent / "base").shapes
    alone = PeftAdapter.open(checkpoint).load(model)
    whole = PeftAdapter.open(out).load(model)
    assert jax.tree.structure(alone.adapters) == jax.tree.structure(whole.adapters)
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(one, other)
