"""What is to be done with the rows of an evaluation."""

import jax

from phi3_jax import GenerationConfig
from phi3_jax.evaluate.metrics import Rouge, TokenLoss
from phi3_jax.evaluate.predict import Task
from phi3_jax.parallel.devices import Devices
from phi3_jax.parallel.mesh import make_mesh
from tests.helpers.distributed_inputs import DATA, rows
from tests.helpers.tokenizers import tiny_tokenizer


def task(*metrics):
    devices = Devices(make_mesh({}, jax.devices()[:1]))
    return Task(tiny_tokenizer(), rows(), DATA, metrics, GenerationConfig(), 0, devices, 3)


def test_a_task_knows_what_its_metrics_need():
    loss, rouge = TokenLoss(), Rouge.__new__(Rouge)
    assert (task(loss).needs_loss, task(loss).needs_answers) == (True, False)
    assert (task(rouge).needs_loss, task(rouge).needs_answers) == (False, True)
    assert (task(loss, rouge).needs_loss, task(loss, rouge).needs_answers) == (True, True)
    assert task(loss).batch_size == 3


def test_a_prompt_is_what_stands_before_the_last_answer():
    one = task()
    one.rows.prompt_lengths[4] = 2
    assert one.prompt(4) == one.rows[4][0][:2].tolist()
    assert one.prompt(0) == []
