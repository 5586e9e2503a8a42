"""How a run ends that cannot go on."""

import errno
import os
import re
from pathlib import Path

import pytest

from phi3_jax import InputError
from phi3_jax.system.files import StorageError
from phi3_jax.training import adapter_files
from phi3_jax.training.folder import Checkpoints
from phi3_jax.training.loop import train
from tests.helpers.disks import refusing
from tests.helpers.runs import run_config, write_inputs

SHORT = {"max_steps": 4, "eval_strategy": "no", "eval_steps": None, "logging_steps": 1}


ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("number", [errno.ENOSPC, pytest.param(errno.EACCES, marks=pytest.mark.slow)])
def test_weights_that_cannot_be_written_go_elsewhere(inputs, monkeypatch, number):
    save, calls = adapter_files.save_adapter, []

    def save_in_vain(folder, *arguments, **options):
        calls.append(folder)
        if len(calls) == 1:
            with monkeypatch.context() as patch:
                patch.setattr("phi3_jax.peft.save.write_safetensors", refusing(number))
                save(folder, *arguments, **options)
        save(folder, *arguments, **options)

    monkeypatch.setattr(adapter_files, "save_adapter", save_in_vain)
    fallback = inputs / f"fallback{number}"
    run = run_config(inputs, f"refused{number}", training={**SHORT, "fallback_dir": str(fallback)})
    with pytest.raises(StorageError, match=os.strerror(number)) as refused:
        train(run)
    message = str(refused.value)
    assert message.startswith(f"{inputs}/refused{number}/adapter: cannot be written")
    if number == errno.ENOSPC:
        size = (fallback / f"refused{number}-step4" / ADAPTER).stat().st_size
        needed = int(re.search(r"([\d,]+) bytes are needed", message)[1].replace(",", ""))
        assert 0.5 * size < needed <= size
    assert "the weights of step 4 are in" in message
    assert not (inputs / f"refused{number}" / "adapter").exists()


def test_without_a_fallback_or_with_a_full_one_it_is_said(inputs, monkeypatch):
    monkeypatch.setattr("phi3_jax.peft.save.write_safetensors", refusing(errno.ENOSPC))
    monkeypatch.setattr(adapter_files.Beside, "write", lambda *_: None)  # so that only the end's adapter fails
    with pytest.raises(StorageError, match=r"step 4 is whole; training\.fallback_dir would name a folder for the wei"):
        train(run_config(inputs, "nowhere", training=SHORT))
    settings = {**SHORT, "fallback_dir": str(inputs / "full"), "resume_from_checkpoint": True}
    with pytest.raises(
        StorageError, match=r"nor can the weights of step 4 be saved in .*full/nowhere-step4/adapter: c"
    ):
        train(run_config(inputs, "nowhere", training=settings))
    (inputs / "file").write_text("")
    with pytest.raises(InputError, match=r"training\.fallback_dir .*file.*expected a folder"):
        train(run_config(inputs, "other", training={**SHORT, "fallback_dir": str(inputs / "file")}))


@pytest.mark.slow
def test_full_finetuning_falls_back_too(inputs, monkeypatch):
    monkeypatch.setattr(Checkpoints, "save", lambda *_: (_ for _ in ()).throw(StorageError("full")))
    settings = {**SHORT, "max_steps": 1, "fallback_dir": str(inputs / "models")}
    with pytest.raises(StorageError, match=r"full; there is no checkpoint; the weights of step 1 are in .*/model$"):
        train(run_config(inputs, "full", peft={"full_finetuning": True}, training=settings))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (inputs / "models" / "full-step1" / "model").iterdir()
    }
