"""Starts computed from the base's weights: PiSSA and OLoRA, after PEFT's `pissa_init` and `olora_init`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from phi3_jax.config.lora import PISSA
from phi3_jax.lora.adapters import LoraLinear, ResidualLora

OVERSAMPLING = 6  # columns beside the rank; what torch.svd_lowrank has by default


def pissa_start(name: str, key: PRNGKeyArray) -> Callable[..., ResidualLora]:
    """PiSSA's start by the name it has in a configuration: `pissa` (a whole SVD) or `pissa_niter_N`
    (a randomised one with N power iterations, drawn from `key`; seconds where the other takes minutes).

    A = √S Vᵀ and B = U √S of the r largest singular values, divided by the scale:
    https://arxiv.org/abs/2404.02948.
    """
    match = PISSA.fullmatch(name)
    iterations = match and match[1]
    singular = whole_svd if not iterations else partial(_randomised, key=key, iterations=int(iterations))

    def start(map_layers: Callable[..., Any], r: int, scaling: float, dropout: float) -> ResidualLora:
        return _residual(map_layers(partial(_pissa, singular=singular, r=r, scaling=scaling)), scaling, dropout)

    return start


def olora_start(map_layers: Callable[..., Any], r: int, scaling: float, dropout: float) -> ResidualLora:
    """OLoRA's start: B and A the first r columns of Q and rows of R, W = Q R: https://arxiv.org/abs/2406.01775."""
    return _residual(map_layers(partial(_olora, r=r)), scaling, dropout)


def whole_svd(weight: Float[Array, "out in"], r: int) -> tuple[Array, Array, Array]:
    """U, S and Vᵀ of the r largest singular values."""
    u, s, vh = jnp.linalg.svd(weight, full_matrices=False)
    return u[:, :r], s[:r], vh[:r]


def _randomised(
    weight: Float[Array, "out in"], r: int, *, key: PRNGKeyArray, iterations: int
) -> tuple[Array, Array, Array]:
    """The same, nearly: Halko, Martinsson and Tropp's subspace iteration (https://arxiv.org/abs/0909.4061)."""
    columns = min(r + OVERSAMPLING, *weight.shape)
    q = jnp.linalg.qr(weight @ jax.random.normal(key, (weight.shape[1], columns), weight.dtype))[0]

    def iterate(_: int, q: Array) -> Array:
        return jnp.linalg.qr(weight @ jnp.linalg.qr(weight.T @ q)[0])[0]

    q = jax.lax.fori_loop(0, iterations, iterate, q)
    u, s, vh = jnp.linalg.svd(q.T @ weight, full_matrices=False)
    return (q @ u)[:, :r], s[:r], vh[:r]


def _pissa(weight: Float[Array, "out in"], *, singular: Callable[..., Any], r: int, scaling: float) -> Any:
    u, s, vh = singular(weight, r)
    root = jnp.sqrt(s / scaling)
    return root[:, None] * vh, u * root


def _olora(weight: Float[Array, "out in"], *, r: int) -> Any:
    q, upper = jnp.linalg.qr(weight)
    return upper[:r], q[:, :r]


def _residual(a_and_b: tuple[Array, Array], scaling: float, dropout: float) -> ResidualLora:
    a, b = a_and_b
    # Copies: what trains is donated to the train step, what it started from is not.
    return ResidualLora(LoraLinear(a, b, scaling, dropout), jnp.copy(a), jnp.copy(b))
