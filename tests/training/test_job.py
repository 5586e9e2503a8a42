"""What a run works on, checked before anything is written."""

import json

import pytest

from phi3_jax import InputError
from phi3_jax.training import job
from phi3_jax.training.job import job_devices, load_job
from tests.helpers.checkpoints import OUTGROWN_ERROR, write_outgrown_checkpoint
from tests.helpers.models import tiny_model
from tests.helpers.runs import run_config


def test_devices_that_are_not_there_are_refused(tmp_path):
    run, config = run_config(tmp_path), tiny_model(1).config
    assert job_devices(run, config).mesh.size == 1
    more = type(run).from_dict({**run.to_dict(), "parallel": {"fsdp": 64}})
    with pytest.raises(InputError, match="does not divide the"):
        job_devices(more, config)


@pytest.mark.parametrize("file", ["chats", "eval"])
def test_a_token_that_the_model_has_no_row_for_is_named_before_weights_are_loaded(file, tmp_path, monkeypatch):
    write_outgrown_checkpoint(tmp_path / "base")
    for name in ("chats", "eval"):
        answers = ["tea", "tea<call>" if name == file else "milk"]
        rows = [{"prompt": "what", "completion": answer} for answer in answers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(job, "load_model_and_lora", pytest.fail)
    with pytest.raises(InputError) as error:
        load_job(run_config(tmp_path))
    assert str(error.value) == f"{tmp_path}/{file}.jsonl, row 2: {OUTGROWN_ERROR}"


def test_a_token_without_a_row_that_no_row_uses_is_told(tmp_path):
    write_outgrown_checkpoint(tmp_path / "base")
    for name in ("chats", "eval"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "what", "completion": "tea"}\n')
    loaded = load_job(run_config(tmp_path))
    assert "none for 1 token of the tokenizer: '<call>' (60); rows and prompts" in loaded.data.summary()
