"""`parallel: auto` on the devices that are here."""

import jax
import pytest

from phi3_jax.config.run import RunConfig
from phi3_jax.performance.here import with_axes
from tests.helpers.runs import run_config, write_inputs


@pytest.mark.skipif(jax.device_count() != 1, reason="one device's")
def test_axes_stand_in_place_of_auto_and_a_line_says_why(tmp_path, capsys):
    run = run_config(write_inputs(tmp_path))
    auto = RunConfig.from_dict({**run.to_dict(), "parallel": "auto"})
    assert with_axes(auto).parallel == run.parallel
    assert "parallel: there is one device" in capsys.readouterr().err
    with_axes(auto.changed({"logging.verbosity": "quiet"}))
    assert capsys.readouterr().err == ""
