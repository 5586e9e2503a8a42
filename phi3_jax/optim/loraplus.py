"""LoRA+ (https://arxiv.org/abs/2402.12354): B learns faster than A.

The groups are those of `peft.optimizers.create_loraplus_optimizer`: A and embedding adapters apart, B
and all vectors (biases, DoRA's magnitudes, norms) learn `loraplus_lr_ratio` times faster.
"""

import jax
import optax
from jaxtyping import Array, PyTree

from phi3_jax.config.training import TrainingSection
from phi3_jax.lora import roles
from phi3_jax.system.dotted import path_names


def learning_rate_factors(params: optax.Params, training: TrainingSection) -> PyTree[float]:
    """For each leaf how many times the schedule's learning rate is its own.

    A and B of an embedding's adapter get `loraplus_lr_embedding` at the schedule's peak.
    """
    ratio = training.loraplus_lr_ratio
    assert ratio is not None

    def factor(path: tuple[object, ...], leaf: Array) -> float:
        if roles.is_embedding_adapter(path):
            return training.loraplus_lr_embedding / training.learning_rate
        is_vector = leaf.ndim - roles.stack_axes(path) == 1
        return ratio if path_names(path)[-1] == "lora_B" or is_vector else 1.0

    return jax.tree_util.tree_map_with_path(factor, params)


def decays(params: optax.Params) -> PyTree[bool]:
    """True where weight decay applies: everywhere but on biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "bias" not in path_names(path)[-1], params)


def scale_by_group(training: TrainingSection) -> optax.GradientTransformation:
    """Multiplies each leaf's update by its own factor of the learning rate."""
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda u, f: u * f, updates, learning_rate_factors(updates, training))
    )
