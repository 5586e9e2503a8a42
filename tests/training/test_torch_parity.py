"""Loss, schedules, clipping and optimizers against PyTorch's and transformers'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.optimization import Adafactor  # noqa: E402
from transformers.trainer_pt_utils import LabelSmoother  # noqa: E402

from phi3_jax.config.training import TrainingSection  # noqa: E402
from phi3_jax.hf.checkpoint import Checkpoint  # noqa: E402
from phi3_jax.objectives.next_token import loss  # noqa: E402
from phi3_jax.optim.optimizer import make_optimizer  # noqa: E402
from phi3_jax.optim.schedule import make_schedule, warmup_steps  # noqa: E402
from tests.helpers.references import torch_phi3  # noqa: E402


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return torch_phi3(folder), Checkpoint.open(folder).load_model(dtype=jnp.float32)


def batch_with_labels():
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 99, (3, 20)).astype(np.int32)
    mask = (np.arange(20) < np.array([[20], [13], [7]])).astype(np.int32)
    labels = np.where((mask == 1) & (rng.random(ids.shape) < 0.6), ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def as_torch(batch):
    return {name: torch.tensor(x, dtype=torch.long) for name, x in batch.items()}


def test_loss_is_that_of_transformers_for_labels(models):
    reference, model = models
    batch = batch_with_labels()
    with torch.no_grad():
        expected = reference(**as_torch(batch)).loss.item()
    np.testing.assert_allclose(loss(model, None, batch), expected, rtol=1e-5)


@pytest.mark.parametrize("epsilon", [0.1, 0.5])
def test_label_smoothing_is_that_of_transformers_and_pytorch(models, epsilon):
    reference, model = models
    batch = batch_with_labels()
    inputs = as_torch(batch)
    with torch.no_grad():
        outputs = reference(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        smoother = LabelSmoother(epsilon=epsilon)({"logits": outputs.logits}, inputs["labels"], shift_labels=True)
        cross_entropy = torch.nn.CrossEntropyLoss(label_smoothing=epsilon)(
            outputs.logits[:, :-1].reshape(-1, 99), inputs["labels"][:, 1:].reshape(-1)
        )
    ours = loss(model, None, batch, label_smoothing=epsilon)
    np.testing.assert_allclose(ours, smoother.item(), rtol=1e-5)
    np.testing.assert_allclose(ours, cross_entropy.item(), rtol=1e-5)


@pytest.mark.parametrize("kind", ["constant", "constant_with_warmup", "linear", "cosine"])
@pytest.mark.parametrize(("total", "warm_up"), [(30, {"warmup_ratio": 0.1}), (7, {"warmup_steps": 7}), (5, {})])
def test_schedules_are_those_of_transformers(kind, total, warm_up):
    training = TrainingSection(learning_rate=3e-4, lr_scheduler_type=kind, **{"warmup_ratio": 0.0, **warm_up})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = transformers.get_scheduler(
        kind, optimizer, num_warmup_steps=warmup_steps(training, total), num_training_steps=total
    )
    expected = []
    for _ in range(total):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    ours = [make_schedule(training, total)(i) for i in range(total)]
    np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=1e-10)  # float32 against float64


def torch_optimizer(name, parameter, training):
    betas = training.adam_beta1, training.adam_beta2
    rate, decay = training.learning_rate, training.weight_decay
    if name == "adamw":
        return torch.optim.AdamW([parameter], lr=rate, betas=betas, eps=training.adam_epsilon, weight_decay=decay)
    if name == "adafactor":
        return Adafactor([parameter], lr=rate, weight_decay=decay, scale_parameter=False, relative_step=False)
    return torch.optim.SGD([parameter], lr=rate, weight_decay=decay)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
def test_optimizers_step_as_pytorchs_do(name):
    """Twenty steps with changing gradients, some of them clipped, and weight decay."""
    rng = np.random.default_rng(1)
    # A vector, since optax factors only matrices of 128 rows and more, transformers' Adafactor all.
    start = rng.normal(size=40).astype(np.float32)
    grads = [rng.normal(scale=0.05 + 0.02 * i, size=40).astype(np.float32) for i in range(20)]
    training = TrainingSection(
        optim=name, learning_rate=1e-2, lr_scheduler_type="constant", weight_decay=0.1, max_grad_norm=1.0
    )
    tx = make_optimizer(training, make_schedule(training, 20))
    params = {"lora_A": jnp.asarray(start)}
    state = tx.init(params)
    parameter = torch.nn.Parameter(torch.tensor(start))
    optimizer = torch_optimizer(name, parameter, training)
    for grad in grads:
        updates, state = tx.update({"lora_A": jnp.asarray(grad)}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        parameter.grad = torch.tensor(grad)
        torch.nn.utils.clip_grad_norm_([parameter], 1.0)
        optimizer.step()
    np.testing.assert_allclose(params["lora_A"], parameter.detach().numpy(), rtol=2e-5, atol=2e-6)
