"""LoRA-FA (https://arxiv.org/abs/2308.03303): A stays as it is drawn, and B's gradient makes up for it.

B's gradient G is replaced by G (A Aᵀ)⁻¹ / s², whose update of W = s B A is the nearest to the gradient
of W itself. The arithmetic is that of `peft.optimizers.create_lorafa_optimizer`, but that PEFT makes
that product in bfloat16 where the machine has it, and here it is always float32.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from phi3_jax.lora import roles
from phi3_jax.model.products import precise_matmul
from phi3_jax.optim.adam8bit import bias_correction
from phi3_jax.system.dotted import dotted, path_names
from phi3_jax.system.errors import InputError

_DELTA = 1e-8  # PEFT's, added to A Aᵀ


@runtime_checkable
class _LowRank(Protocol):
    """Any adapter that is a product of A and B; of one that is half frozen a part is None."""

    lora_A: Float[Array, "*stack r in"] | None
    lora_B: Float[Array, "*stack out r"] | None
    scaling: float


class LoraFAState(NamedTuple):
    """What the optimizer keeps.

    Attributes:
        step: how many are done.
        mu: the first moment of each parameter, float32.
        nu: the second one.
        inverses: by the place of B in the tree (A Aᵀ)⁻¹ / s², which stays as it is since A does.
    """

    step: Int[Array, ""]
    mu: PyTree[Array]
    nu: PyTree[Array]
    inverses: dict[str, Float[Array, "*stack r r"]]


def lorafa(
    schedule: optax.Schedule, lora: PyTree, b1: float, b2: float, eps: float, weight_decay: float
) -> optax.GradientTransformation:
    """The whole optimizer, learning rate and weight decay included.

    Each B whose A is frozen gets the gradient above, everything else its own; then a step of AdamW as
    transformers 4 had it (`adamw_hf`): epsilon is added before the bias is corrected, and the weight
    decays after the step. As in PEFT all that trains decays, norms and biases too.

    Args:
        schedule: the learning rate by step.
        lora: the adapter, or that half of it which is frozen: where its A are.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: a share of the weight for each unit of the learning rate.

    Raises:
        InputError: where no A is frozen.
    """
    frozen = list(_frozen(lora))
    if not frozen:
        raise InputError("training.optim is lorafa, but no adapter of a linear layer has its A frozen; adapt one")

    def init(params: optax.Params) -> LoraFAState:
        def zeros() -> PyTree[Array]:
            return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)

        inverses = {place: _inverse(a, scaling) for place, a, scaling in frozen}
        return LoraFAState(jnp.zeros((), jnp.int32), zeros(), zeros(), inverses)

    def update(
        updates: optax.Updates, state: LoraFAState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, LoraFAState]:
        done = optax.safe_increment(state.step)
        rate = schedule(state.step)
        step_size = rate * jnp.sqrt(bias_correction(b2, done)) / bias_correction(b1, done)

        def projected(path: tuple[object, ...], grad: Array) -> Array:
            inverse = state.inverses.get(_place(path))
            return grad if inverse is None else precise_matmul(grad, inverse)

        grads = jax.tree_util.tree_map_with_path(projected, updates)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)

        def step(m: Array, v: Array, p: Array) -> Array:
            moved: Array = -step_size * m / (jnp.sqrt(v) + eps)
            decayed: Array = moved - rate * weight_decay * (p + moved)
            return decayed

        return jax.tree.map(step, mu, nu, params), LoraFAState(done, mu, nu, state.inverses)

    return optax.GradientTransformation(init, update)


def _frozen(lora: PyTree) -> Iterator[tuple[str, Float[Array, "*stack r in"], float]]:
    """(place of its B, A, scaling) of all adapters whose A does not train."""
    found = jax.tree_util.tree_leaves_with_path({"lora": lora}, is_leaf=lambda node: isinstance(node, _LowRank))
    for path, adapter in found:
        if isinstance(adapter, _LowRank) and adapter.lora_A is not None:
            place = (*path, jax.tree_util.GetAttrKey("lora_B"))
            if not roles.is_embedding_adapter(place):
                yield _place(place), adapter.lora_A, adapter.scaling


def _place(path: tuple[object, ...]) -> str:
    return dotted(path_names(path))


def _inverse(a: Float[Array, "*stack r in"], scaling: float) -> Float[Array, "*stack r r"]:
    """The pseudo-inverse of A Aᵀ + δ I, divided by s²."""
    a = a.astype(jnp.float32)
    gram = precise_matmul(a, a.mT)
    rank = gram.shape[-1]
    # The cut-off below which torch.linalg.pinv takes singular values for zeros.
    cutoff = rank * jnp.finfo(jnp.float32).eps
    inverse = jnp.linalg.pinv(gram + _DELTA * jnp.eye(rank), rtol=cutoff, hermitian=True)
    return inverse / scaling**2
