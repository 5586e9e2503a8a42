"""The step that is compiled while the weights load: the run's own, once, and with its errors."""

import jax
import numpy as np
import pytest

from phi3_jax import InputError
from phi3_jax.training import abstract, ahead, step
from phi3_jax.training.abstract import AbstractStep, abstract_step
from phi3_jax.training.ahead import StepAhead, step_ahead
from phi3_jax.training.job import load_job
from phi3_jax.training.trainer import Trainer
from tests.helpers.runs import run_config, write_inputs

SHORT = {"max_steps": 1, "eval_strategy": "no", "eval_steps": None, "save_strategy": "no"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("ahead"))


def begun(run, **options):
    job = load_job(run, **options)
    trainer = Trainer(run, job)
    trainer.batches.close()
    return job, trainer, job.devices.put(job.batches.batch_of(0), trainer.batch_size)


@pytest.mark.slow
def test_a_run_compiles_its_step_once_and_trains_as_without(inputs, monkeypatch):
    compiled = []
    for name, module in (("ahead", abstract), ("when it is needed", step)):
        compile_step = module.compile_step
        monkeypatch.setattr(
            module, "compile_step", lambda *a, name=name, do=compile_step: (compiled.append(name), do(*a))[1]
        )
    taken = []
    for compiles in (True, False):
        job, trainer, batch = begun(run_config(inputs, training=SHORT), compiles=compiles)
        with job.devices.in_use():
            taken.append(trainer.train_step(trainer.state, job.frozen, batch).trainable)
        assert trainer.train_step.compilations == 1
    assert compiled == ["ahead", "when it is needed"]
    for one, other in zip(*map(jax.tree.leaves, taken), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"quantization": "nf4", "dtype": "bfloat16"}, "training": {"optim": "adamw_8bit"}},
        {"peft": {"full_finetuning": True}, "training": {"optim": "adafactor"}},
        {
            "peft": {
                "use_dora": True,
                "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
                "modules_to_save": ["lm_head"],
            }
        },
        {"training": {"optim": "lorafa"}, "data": {"packing": False}},
        {"peft": {"init_lora_weights": "pissa", "rank_pattern": {"down_proj": 3}}},
    ],
)
def test_what_is_foreseen_is_what_comes(inputs, sections, monkeypatch):
    monkeypatch.setattr(AbstractStep, "compile", lambda self: "the program")
    run = run_config(inputs, **{**sections, "training": {**SHORT, **sections.get("training", {})}})
    job, trainer, batch = begun(run, compiles=True)
    assert job.ahead(trainer.state, job.frozen, batch) == "the program"


def test_what_comes_otherwise_is_compiled_anew_and_told(inputs, monkeypatch, capfd):
    monkeypatch.setattr(AbstractStep, "compile", lambda self: "the program")
    job, trainer, batch = begun(run_config(inputs, training=SHORT))
    other = run_config(inputs, training=SHORT, peft={"r": 3})
    found = StepAhead(32, lambda: abstract_step(other, job.config, job.devices.mesh, length=32))
    assert found(trainer.state, job.frozen, batch) is None
    assert "compiled anew, since what was loaded differs" in capfd.readouterr().err
    longer = {name: np.pad(array, ((0, 0), (0, 0), (0, 8))) for name, array in batch.items()}
    assert found(trainer.state, job.frozen, longer) is None
    assert not capfd.readouterr().err


def test_its_error_comes_where_the_step_is_wanted(inputs):
    job, trainer, batch = begun(run_config(inputs, training=SHORT))

    def fail():
        raise InputError("compiler option x is 1")

    found = StepAhead(32, fail)
    with pytest.raises(InputError, match="compiler option x"):
        found(trainer.state, job.frozen, batch)


def test_what_only_the_data_tells_is_not_foreseen(inputs, monkeypatch):
    monkeypatch.setattr(ahead, "begin", pytest.fail)
    job, _, _ = begun(run_config(inputs, training=SHORT))
    eva = run_config(inputs, peft={"init_lora_weights": "eva"})
    assert step_ahead(eva, job.config, job.devices, total_steps=1, length=32) is None
    assert step_ahead(run_config(inputs), job.config, job.devices, total_steps=1, length=None) is None


def test_a_fault_of_the_files_is_told_before_anything_is_compiled(tmp_path, monkeypatch):
    write_inputs(tmp_path)
    monkeypatch.setattr(ahead, "begin", pytest.fail)
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(InputError, match="cut off"):
        load_job(run_config(tmp_path, training=SHORT), compiles=True)
