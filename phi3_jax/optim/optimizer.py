"""Optimizers that step as those of transformers' Trainer do."""

import re

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from phi3_jax.config.training import TrainingSection
from phi3_jax.optim import loraplus
from phi3_jax.optim.adafactor import scale_by_adafactor
from phi3_jax.optim.adam8bit import scale_by_adam8bit
from phi3_jax.optim.lorafa import lorafa

# transformers' Trainer.get_decay_parameter_names: no decay on biases and norms.
_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """PyTorch's `clip_grad_norm_`: scales by max_norm / (norm + 1e-6) where that is below 1."""

    def clipped(updates: optax.Updates, _: optax.Params | None) -> optax.Updates:
        scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * scale, updates)

    return optax.stateless(clipped)


def decays(params: optax.Params) -> PyTree[bool]:
    """True where weight decay applies: everywhere but on norms and biases, as in transformers."""

    def decayed(path: tuple[object, ...], _: Array) -> bool:
        return not _UNDECAYED.search(jax.tree_util.keystr(path, simple=True, separator="."))

    return jax.tree_util.tree_map_with_path(decayed, params)


def make_optimizer(
    training: TrainingSection, schedule: optax.Schedule, lora: PyTree = None
) -> optax.GradientTransformation:
    """Clipping, the optimizer named by `optim`, decoupled weight decay, and the schedule.

    `lion` takes adam_beta1 and adam_beta2, as in transformers' Trainer. `adamw_8bit` and `adafactor` are
    described in `optim.adam8bit` and `optim.adafactor`. With
    `loraplus_lr_ratio` groups of parameters learn, and decay, as `optim.loraplus` says.

    Args:
        training: the settings.
        schedule: the learning rate by step, see `optim.schedule`.
        lora: the adapter or its frozen half: `lorafa` (see there) takes A from it.

    Raises:
        InputError: where `lorafa` finds no frozen A.
    """
    betas = training.adam_beta1, training.adam_beta2
    clip = clip_by_global_norm(training.max_grad_norm) if training.max_grad_norm else optax.identity()
    if training.optim == "lorafa":
        return optax.chain(clip, lorafa(schedule, lora, *betas, training.adam_epsilon, training.weight_decay))
    core = {
        "adamw": lambda: optax.scale_by_adam(*betas, eps=training.adam_epsilon),
        "adamw_8bit": lambda: scale_by_adam8bit(*betas, eps=training.adam_epsilon),
        "adafactor": scale_by_adafactor,
        "lion": lambda: optax.scale_by_lion(*betas),
        "sgd": optax.identity,
    }[training.optim]()
    has_groups = training.loraplus_lr_ratio is not None
    groups = loraplus.scale_by_group(training) if has_groups else optax.identity()
    mask = loraplus.decays if has_groups else decays
    decay = optax.add_decayed_weights(training.weight_decay, mask=mask) if training.weight_decay else optax.identity()
    return optax.chain(clip, core, decay, groups, optax.scale_by_learning_rate(schedule))
