"""What trains: one tree of truth values, by which gradients, optimizer state and updates exist.

The trees here are `{"model": nnx state of the base, "lora": Lora or None}`.
"""

from typing import Any

import jax
import optax
from flax import nnx

from phi3_jax.lora import roles
from phi3_jax.lora.tree import Lora
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.system.dotted import path_names
from phi3_jax.system.errors import InputError


def trainable_mask(
    model: Phi3ForCausalLM | nnx.State, lora: Lora | None, *, full_finetuning: bool = False, freeze_A: bool = False
) -> dict[str, Any]:
    """True at every array that trains: those of the adapter, or with `full_finetuning` all there are.

    The constants that PiSSA and OLoRA start from (`start_A`, `start_B`) never train.

    **Arguments**: `model`, the base or its state (`nnx.split(model)[1]`); `freeze_A`, that A of linear
    layers stays as it is, for LoRA-FA. (A of an embedding trains even so: it starts at zero.)

    **Returns** `{"model": state, "lora": Lora or None}` with a bool for every array.

    Raises `InputError` where nothing would train.
    """
    if lora is None and not full_finetuning:
        raise InputError("nothing would train: there is no adapter; give one, or set full_finetuning")
    state = nnx.state(model) if isinstance(model, nnx.Module) else model

    def trains(path: Any, _: Any) -> bool:
        name = path_names(path)[-1]
        is_frozen_A = freeze_A and name == "lora_A" and not roles.is_embedding_adapter(path)
        return not (is_frozen_A or name in ("start_A", "start_B"))

    return {
        "model": jax.tree.map(lambda _: full_finetuning, state),
        "lora": jax.tree_util.tree_map_with_path(trains, lora),
    }


def partition(tree: Any, mask: Any) -> tuple[Any, Any]:
    """(trainable, frozen): two trees of the same nesting, each with None in the other's places.

    None is an empty pytree, so `jax.grad` with respect to the first, and an optimizer's state for
    it, hold nothing for the frozen arrays.
    """
    trainable = jax.tree.map(lambda leaf, trains: leaf if trains else None, tree, mask)
    frozen = jax.tree.map(lambda leaf, trains: None if trains else leaf, tree, mask)
    return trainable, frozen


def combine(trainable: Any, frozen: Any) -> Any:
    """The tree that `partition` took apart."""
    return jax.tree.map(lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda leaf: leaf is None)


def freeze(tx: optax.GradientTransformation, mask: Any) -> optax.GradientTransformation:
    """`tx` where the mask is True, updates of zero and no optimizer state elsewhere.

    For gradients of the whole tree; those of `partition`'s first half need no freezing. (Not
    `optax.masked`, which hands the other gradients through as updates.)
    """
    labels = jax.tree.map(lambda trains: "train" if trains else "freeze", mask)
    return optax.partition({"train": tx, "freeze": optax.set_to_zero()}, labels)
