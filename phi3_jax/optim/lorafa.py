"""LoRA-FA (https://arxiv.org/abs/2308.03303): A stays as it is drawn, and B's gradient makes up for it.

B's gradient G is replaced by G (A Aᵀ)⁻¹ / s², whose update of W = s B A is the nearest to the gradient
of W itself. The arithmetic is that of `peft.optimizers.create_lorafa_optimizer`, but that PEFT makes
that product in bfloat16 where the machine has it, and here it is always float32.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from phi3_jax.lora import roles
from phi3_jax.model.products import precise_matmul
from phi3_jax.optim.adam8bit import bias_correction
from phi3_jax.system.dotted import dotted, path_names
from phi3_jax.system.errors import InputError

_DELTA = 1e-8  # PEFT's, added to A Aᵀ


class LoraFAState(NamedTuple):
    """`step`, how many are done; `mu` and `nu`, the moments; `inverses`, by the place of B in the tree
    (A Aᵀ)⁻¹ / s² `[*stack, r, r]`, which stays as it is since A does."""

    step: Int[Array, ""]
    mu: Any
    nu: Any
    inverses: dict[str, Array]


def lorafa(
    schedule: optax.Schedule, lora: Any, b1: float, b2: float, eps: float, weight_decay: float
) -> optax.GradientTransformation:
    """The whole optimizer, learning rate and weight decay included.

    Each B whose A is frozen gets the gradient above, everything else its own; then a step of AdamW as
    transformers 4 had it (`adamw_hf`): epsilon is added before the bias is corrected, and the weight
    decays after the step. As in PEFT all that trains decays, norms and biases too.

    **Arguments**: `lora`, the adapter, or that half of it which is frozen: where its A are.

    Raises `InputError` where no A is frozen.
    """
    frozen = dict(_frozen(lora))
    if not frozen:
        raise InputError("training.optim is lorafa, but no adapter of a linear layer has its A frozen; adapt one")

    def init(params: Any) -> LoraFAState:
        def zeros() -> Any:
            return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)

        inverses = {name: _inverse(adapter.lora_A, adapter.scaling) for name, adapter in frozen.items()}
        return LoraFAState(jnp.zeros((), jnp.int32), zeros(), zeros(), inverses)

    def update(updates: Any, state: LoraFAState, params: Any = None) -> tuple[Any, LoraFAState]:
        done = optax.safe_increment(state.step)
        rate = schedule(state.step)
        step_size = rate * jnp.sqrt(bias_correction(b2, done)) / bias_correction(b1, done)

        def projected(path: Any, grad: Array) -> Array:
            inverse = state.inverses.get(_place(path))
            return grad if inverse is None else precise_matmul(grad, inverse)

        grads = jax.tree_util.tree_map_with_path(projected, updates)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)

        def step(m: Array, v: Array, p: Array) -> Array:
            moved = -step_size * m / (jnp.sqrt(v) + eps)
            return moved - rate * weight_decay * (p + moved)

        return jax.tree.map(step, mu, nu, params), LoraFAState(done, mu, nu, state.inverses)

    return optax.GradientTransformation(init, update)


def _frozen(lora: Any) -> Iterator[tuple[str, Any]]:
    """(place of its B, adapter) of all adapters whose A does not train."""
    found = jax.tree_util.tree_leaves_with_path({"lora": lora}, is_leaf=_is_adapter)
    for path, adapter in found:
        if _is_adapter(adapter) and adapter.lora_A is not None:
            place = (*path, jax.tree_util.GetAttrKey("lora_B"))
            if not roles.is_embedding_adapter(place):
                yield _place(place), adapter


def _is_adapter(node: Any) -> bool:
    return all(hasattr(node, name) for name in ("lora_A", "lora_B", "scaling"))


def _place(path: Any) -> str:
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
