"""Initialisers that take A and B from the base's weights: PiSSA and OLoRA, after PEFT's `pissa_init` and
`olora_init`."""

from functools import partial
from typing import Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from phi3_jax.config.lora import PISSA
from phi3_jax.lora.adapters import LoraLinear, ResidualLora
from phi3_jax.lora.singular import randomised_svd, whole_svd

OVERSAMPLING = 6  # columns beside the rank; what torch.svd_lowrank has by default

AandB = tuple[Float[Array, "*stack r in"], Float[Array, "*stack out r"]]


class Initialiser(Protocol):
    """What makes A and B from a layer's weight."""

    def __call__(self, weight: Float[Array, "out in"], r: int, scaling: float) -> AandB:
        """Those of rank `r`, for an adapter with this scale."""
        ...


def pissa(name: str, key: PRNGKeyArray) -> Initialiser:
    """PiSSA by the name it has in a configuration: `pissa` (a whole SVD) or `pissa_niter_N` (a randomised one
    with N power iterations, drawn from `key`; seconds where the other takes minutes).

    A = √S Vᵀ and B = U √S of the r largest singular values, divided by the scale:
    https://arxiv.org/abs/2404.02948.
    """
    match = PISSA.fullmatch(name)
    iterations = match and match[1]
    if not iterations:
        return _pissa
    return partial(_randomised_pissa, key=key, iterations=int(iterations))


def _pissa(weight: Float[Array, "out in"], r: int, scaling: float) -> AandB:
    return _halves(*whole_svd(weight, r), scaling)


def _randomised_pissa(
    weight: Float[Array, "out in"], r: int, scaling: float, *, key: PRNGKeyArray, iterations: int
) -> AandB:
    u, s, vh = randomised_svd(weight, r + OVERSAMPLING, iterations, key)
    return _halves(u[:, :r], s[:r], vh[:r], scaling)


def _halves(
    u: Float[Array, "out r"], s: Float[Array, "r"], vh: Float[Array, "r in"], scaling: float
) -> tuple[Float[Array, "r in"], Float[Array, "out r"]]:
    root = jnp.sqrt(s / scaling)
    return root[:, None] * vh, u * root


def olora(weight: Float[Array, "out in"], r: int, scaling: float) -> AandB:
    """OLoRA: B and A the first r columns of Q and rows of R, W = Q R: https://arxiv.org/abs/2406.01775."""
    del scaling
    q, upper = jnp.linalg.qr(weight)
    return upper[:r], q[:, :r]


def residual(initial: AandB, scaling: float, dropout: float, *, in_base: bool = False) -> ResidualLora:
    """The adapter that begins as this A and B."""
    # Copies: what trains is donated to the train step, what it started from is not.
    a, b = map(jnp.copy, initial)
    return ResidualLora(LoraLinear(*initial, scaling, dropout), a, b, in_base)
