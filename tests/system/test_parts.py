"""Which part of a step an operation belongs to."""

import re

import numpy as np

from phi3_jax.config.run import RunConfig
from phi3_jax.performance.train import prepare, random_batch
from phi3_jax.system.parts import PARTS, part_of, phase_of
from tests.helpers.benchmarks import CONFIG


def test_names_of_arguments_and_functions_are_no_parts():
    assert part_of("frozen['model']['layers']['mlp']['down_proj']['weight'].value") is None
    assert part_of("jit(train_step)/jit(mlp_like)/add") is None
    assert part_of("") is None
    assert phase_of("jit(step)/jvp(jit(_forward))/while/body/norm/mul") == "forward"


def test_every_part_is_named_in_the_compiled_step_and_most_in_both_passes():
    run = RunConfig.from_dict(
        {
            "model": {"name_or_path": "none", "quantization": "nf4"},
            "peft": {"r": 2, "target_modules": "all-linear", "lora_dropout": 0.1},
            "data": {"max_length": 32},
        }
    )
    work = prepare(run, CONFIG, steps=1)
    batch = random_batch(np.random.default_rng(0), run, CONFIG, rows=work.rows)
    with work.job.devices.in_use():
        program = work.train_step.compile(work.state, work.job.frozen, work.job.devices.put(batch, work.rows))
    names = re.findall(r'op_name="([^"]*)"', program.as_text())
    found = {phase: {part_of(name) for name in names if phase_of(name) == phase} for phase in ("forward", "backward")}
    within = {"attention", "mlp"}  # whose operations are all in parts of theirs, or fused with some
    assert set(PARTS) - within <= found["forward"], names
    assert {"norm", "qkv_proj", "rope", "attend", "o_proj", "gated", "down_proj", "lora"} <= found["backward"]
    assert {part_of(name) for name in names if phase_of(name) == "recomputed"} >= {"norm", "dequantise", "dropout"}
