"""What a run works on, checked before anything is written."""

import pytest

from phi3_jax import InputError
from phi3_jax.training.job import job_devices
from tests.helpers.models import tiny_model
from tests.helpers.runs import run_config


def test_devices_that_are_not_there_are_refused(tmp_path):
    run, config = run_config(tmp_path), tiny_model(1).config
    assert job_devices(run, config).mesh.size == 1
    more = type(run).from_dict({**run.to_dict(), "parallel": {"fsdp": 64}})
    with pytest.raises(InputError, match="does not divide the"):
        job_devices(more, config)
