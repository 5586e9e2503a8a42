"""What trains: one tree of truth values, by which gradients, optimizer state and updates exist.

The trees here are `{"model": nnx state of the base, "lora": Lora or None}`.
"""

from typing import TypedDict, TypeVar

import jax
import optax
from flax import nnx
from jaxtyping import PyTree

from phi3_jax.lora import roles
from phi3_jax.lora.tree import Lora
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.system.dotted import path_names
from phi3_jax.system.errors import InputError

Tree = TypeVar("Tree", bound=PyTree)


class Mask(TypedDict):
    """A bool for every array of base and adapter.

    Attributes:
        model: The base's state, its arrays replaced.
        lora: The adapter, its arrays replaced, or None.
    """

    model: PyTree[bool]
    lora: PyTree[bool]


def trainable_mask(
    model: Phi3ForCausalLM | PyTree, lora: Lora | None, *, full_finetuning: bool = False, freeze_A: bool = False
) -> Mask:
    """True at every array that trains: those of the adapter, or with `full_finetuning` all there are.

    The constants that PiSSA and OLoRA are initialised to (`start_A`, `start_B`) never train.

    Args:
        model: The base or its state (`nnx.split(model)[1]`).
        lora: The adapter; None with `full_finetuning` alone.
        full_finetuning: Whether the base's own arrays train.
        freeze_A: Whether A of linear layers stays as it is, for LoRA-FA. (A of an embedding trains even so:
            it is zero at first.)

    Returns:
        `{"model": state, "lora": Lora or None}` with a bool for every array.

    Raises:
        InputError: Where nothing would train.

    Example:
        >>> import phi3_jax as p3
        >>> sizes = dict(vocab_size=9, hidden_size=16, intermediate_size=8, num_hidden_layers=2, head_dim=8)
        >>> config = p3.Phi3Config(**sizes, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)
        >>> model = p3.Phi3ForCausalLM(config, rngs=nnx.Rngs(0))
        >>> lora = p3.init_lora(model, p3.LoraConfig(r=2, target_modules=["o_proj"]), jax.random.key(0))
        >>> mask = p3.trainable_mask(model, lora, freeze_A=True)
        >>> jax.tree.leaves(mask["lora"]), any(jax.tree.leaves(mask["model"]))  # A, B, and all of the base
        ([False, True], False)
    """
    if lora is None and not full_finetuning:
        raise InputError("nothing would train: there is no adapter; give one, or set full_finetuning")
    state = nnx.state(model) if isinstance(model, nnx.Module) else model

    def trains(path: tuple[object, ...], _: object) -> bool:
        name = path_names(path)[-1]
        is_frozen_A = freeze_A and name == "lora_A" and not roles.is_embedding_adapter(path)
        return not (is_frozen_A or name in ("start_A", "start_B"))

    return {
        "model": jax.tree.map(lambda _: full_finetuning, state),
        "lora": jax.tree_util.tree_map_with_path(trains, lora),
    }


def partition(tree: Tree, mask: PyTree[bool]) -> tuple[Tree, Tree]:
    """(trainable, frozen): two trees of the same nesting, each with None in the other's places.

    None is an empty pytree, so `jax.grad` with respect to the first, and an optimizer's state for
    it, hold nothing for the frozen arrays.

    Args:
        tree: Of arrays, such as `{"model": state, "lora": lora}`.
        mask: Of the same nesting, see `trainable_mask`.

    Example:
        >>> partition({"a": 1, "b": 2}, {"a": True, "b": False})
        ({'a': 1, 'b': None}, {'a': None, 'b': 2})
    """
    trainable: Tree = jax.tree.map(lambda leaf, trains: leaf if trains else None, tree, mask)
    frozen: Tree = jax.tree.map(lambda leaf, trains: None if trains else leaf, tree, mask)
    return trainable, frozen


def combine(trainable: Tree, frozen: Tree) -> Tree:
    """The tree that `partition` split.

    Args:
        trainable: A tree with None in some places.
        frozen: A tree of the same nesting, with what belongs in these places.

    Example:
        >>> combine({"a": 1, "b": None}, {"a": None, "b": 2})
        {'a': 1, 'b': 2}
    """
    whole: Tree = jax.tree.map(lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda leaf: leaf is None)
    return whole


def freeze(tx: optax.GradientTransformation, mask: PyTree[bool]) -> optax.GradientTransformation:
    """`tx` where the mask is True, updates of zero and no optimizer state elsewhere.

    For gradients of the whole tree; those of `partition`'s first half need no freezing. (Not
    `optax.masked`, which hands the other gradients through as updates.)

    Args:
        tx: What trains.
        mask: Of the nesting that the parameters have.

    Example:
        >>> params = {"a": jax.numpy.ones(()), "b": jax.numpy.ones(())}
        >>> tx = freeze(optax.sgd(0.5), {"a": True, "b": False})
        >>> updates, _ = tx.update(params, tx.init(params))  # of gradients 1
        >>> float(updates["a"]), float(updates["b"])
        (-0.5, 0.0)
    """
    labels = jax.tree.map(lambda trains: "train" if trains else "freeze", mask)
    return optax.partition({"train": tx, "freeze": optax.set_to_zero()}, labels)
