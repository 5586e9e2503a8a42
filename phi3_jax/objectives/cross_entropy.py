"""Cross-entropy straight from the hidden states: the logits of a whole batch never exist.

The tokens are taken in chunks. A chunk's logits are made, its loss is summed, and where the loss is
being differentiated the chunk's part of the gradient is computed then and there, while its logits
are at hand. What is kept for the backward pass is the gradient itself, `[batch, seq, hidden]`, which
that pass multiplies by one number. So the product with the head is computed once in each direction,
as with all logits in memory, and memory grows with tokens · hidden + a constant, not with
tokens · vocabulary.

Gradients exist for what is being differentiated: a head that is frozen costs none.

A chunk spans the vocabulary. To cut that too would need a second pass over the head to turn partial
sums into probabilities, half as many products again; a chunk of few tokens is as small.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from phi3_jax.lora.mask import combine, partition
from phi3_jax.model.blocks import even_block
from phi3_jax.model.logits import likeliest
from phi3_jax.model.products import contract, precise, project
from phi3_jax.parallel.mesh import ambient_mesh, platform
from phi3_jax.parallel.sharding import constrain, spec

# (logits [*tokens, vocab], x [*tokens, hidden], head, adapters, key) -> logits
Adjust = Callable[[Array, Array, Array, PyTree, PRNGKeyArray | None], Array]

# Logits of one chunk on one device. More do not make a CPU faster; GPUs and TPUs want larger products.
CHUNK_LOGITS = {"cpu": 2**23, "gpu": 2**25, "tpu": 2**25}
# Tokens of a chunk, however large the vocabulary: with fewer, reading the head takes longer than multiplying by it.
# A head is read once for each product, so that would be as many as the device has operations for each byte of its
# memory: 560 on a TPU v6e, 300 on an H100, 400 on an L4. Compiled for v6e and v5e, Phi-4-mini's loss of 8,192 tokens
# takes least with about 700.
LEAST_TOKENS = {"cpu": 128, "gpu": 512, "tpu": 704}

_Tokens = tuple[Array, Array, Array]  # x, targets, is_target
_Sums = tuple[Array, Array]  # loss, correct
_Gradients = tuple[Array | None, PyTree]  # of x, of the parameters that train


@dataclass(frozen=True)
class _Rule:
    """What of the loss is known when it is compiled."""

    label_smoothing: float
    adjust: Adjust
    x_trains: bool = False


def unadjusted(logits: Array, x: Array, head: Array, adapters: PyTree, key: PRNGKeyArray | None) -> Array:
    """The `Adjust` of a head without adapters."""
    del x, head, adapters, key
    return logits


@jax.named_scope("loss")
def cross_entropy_sums(
    x: Float[Array, "batch seq hidden"],
    head: Float[Array, "vocab hidden"],
    targets: Int[Array, "batch seq"],
    is_target: Bool[Array, "batch seq"],
    *,
    label_smoothing: float = 0.0,
    adjust: Adjust = unadjusted,
    adapters: PyTree = None,
    key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The sum over target tokens of -log softmax(x headᵀ)[target], float32, and how many of them are
    the most likely token (of equals the first, as in argmax).

    The logits are float32 whatever the type of `x`; products of float32 arrays are exact, as in the
    model. The gradient of the logits is rounded to the type of `x` before it is multiplied by the
    head, and so is that with respect to `x` when it is stored. Gradients of the head and of adapters
    are summed in float32.

    Under a mesh each device takes its own tokens, see `phi3_jax.parallel.sharding`: `x` is cut over
    batch and sequence, the head's rows over `tensor`. The sums are of all devices' tokens.

    Args:
        x: the normed output of the last layer.
        head: the output head's weight, or the embedding that it shares.
        targets: the token that each position is to predict.
        is_target: whether it counts.
        label_smoothing: ε of (1 - ε) · cross-entropy + ε · mean over the vocabulary of -log p.
        adjust: what adapters make of the logits, `adjust(logits, x, head, adapters, key) -> logits`
            for any number of tokens, `logits` being x headᵀ. A function of a module, not a new one each
            time, which would be compiled each time; everything that is traced comes in by its arguments.
        adapters: pytree of arrays for `adjust`. Those that are differentiated get gradients.
        key: for the dropout of `adjust`; each chunk and device gets its own.
    """
    sums: _Sums = _compiled_sums(_Rule(label_smoothing, adjust), x, head, adapters, key, targets, is_target)
    return sums


@jax.named_scope("loss")
def token_losses(
    x: Float[Array, "batch seq hidden"],
    head: Float[Array, "vocab hidden"],
    targets: Int[Array, "batch seq"],
    *,
    adjust: Adjust = unadjusted,
    adapters: PyTree = None,
) -> tuple[Float[Array, "batch seq"], Bool[Array, "batch seq"]]:
    """What `cross_entropy_sums` adds up, without a gradient: -log softmax(x headᵀ)[target] at each
    position, float32, and whether the target is the most likely token.

    Arguments, chunks and mesh are as there.
    """

    def of_device(head: Array, adapters: PyTree, x: Array, targets: Array) -> tuple[Array, Array]:
        chunks = _Chunks(targets.size, len(head))

        def of_chunk(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
            x, targets = chunk
            with precise(x.dtype):
                logits = constrain(project(x, head, jnp.float32), None, "heads")
                losses, _, guesses = _token_losses(adjust(logits, x, head, adapters, None), targets)
            return losses, guesses == targets

        losses, hits = jax.lax.map(of_chunk, (chunks.cut(x), chunks.cut(targets)))
        return chunks.join(losses).reshape(targets.shape), chunks.join(hits).reshape(targets.shape)

    cut, axes = _token_axes(targets.shape)
    if not axes:
        return of_device(head, adapters, x, targets)
    whole = PartitionSpec()
    return jax.shard_map(
        of_device,
        in_specs=(whole, whole, cut, cut),
        out_specs=(cut, cut),
        axis_names=set(axes),
        check_vma=False,
    )(head, adapters, x, targets)


def chunk_tokens(tokens: int, vocab: int) -> int:
    """How many of a device's `tokens` a chunk holds."""
    tensor = ambient_mesh().shape["tensor"]
    shards = 1 if vocab % tensor else tensor
    return even_block(tokens, max(LEAST_TOKENS[platform()], CHUNK_LOGITS[platform()] * shards // vocab))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(
    rule: _Rule, x: Array, head: Array, adapters: PyTree, key: PRNGKeyArray | None, targets: Array, is_target: Array
) -> _Sums:
    frozen = {"head": head, "adapters": adapters}
    nothing = jax.tree.map(lambda _: None, frozen)
    return _over_mesh(rule, nothing, frozen, key, (x, targets, is_target))[0]


def _sums_forward(rule: _Rule, *primals: PyTree) -> tuple[_Sums, tuple[Array, PyTree]]:
    x, head, adapters, key, targets, is_target = jax.custom_derivatives.custom_vjp_primal_tree_values(primals)
    x_trains, *trains = jax.tree.map(lambda primal: primal.perturbed, primals[:3])
    params = {"head": head, "adapters": adapters}
    trained, frozen = partition(params, dict(zip(params, trains, strict=True)))
    sums, (dx, grads) = _over_mesh(replace(rule, x_trains=x_trains), trained, frozen, key, (x, targets, is_target))
    gradients = dx, jax.tree.map(lambda grad, param: grad.astype(param.dtype), grads, trained)
    # JAX takes it that a function hands on trees of one form, whatever it is differentiated by: an empty
    # array is where there is no gradient.
    return sums, jax.tree.map(lambda g: jnp.zeros(0) if g is None else g, gradients, is_leaf=lambda g: g is None)


def _sums_backward(_: _Rule, gradients: tuple[Array, PyTree], cotangents: tuple[Array, PyTree]) -> tuple[PyTree, ...]:
    x, params = jax.tree.map(lambda g: (g * cotangents[0]).astype(g.dtype) if g.size else None, gradients)
    return x, params["head"], params["adapters"], None, None, None


_sums.defvjp(_sums_forward, _sums_backward, symbolic_zeros=True)
# For the sake of those who call the loss without jit.
_compiled_sums = jax.jit(_sums, static_argnums=0)


def _over_mesh(
    rule: _Rule, trained: PyTree, frozen: PyTree, key: PRNGKeyArray | None, tokens: _Tokens
) -> tuple[_Sums, _Gradients]:
    """The sums and the gradients, each device at its own tokens."""
    cut, axes = _token_axes(tokens[1].shape)
    if not axes:
        return _sums_of_device(rule, trained, frozen, key, tokens)

    def of_device(
        trained: PyTree, frozen: PyTree, key: PRNGKeyArray | None, tokens: _Tokens, device: Array
    ) -> tuple[_Sums, _Gradients]:
        sums, (dx, grads) = _sums_of_device(rule, trained, frozen, _own_key(key, device[0]), tokens)
        return jax.lax.psum(sums, axes), (dx, jax.lax.psum(grads, axes))

    devices = jnp.arange(math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes))
    whole = PartitionSpec()
    # The axes that cut tokens are dealt with here; what is cut over `tensor` is left to the compiler.
    return jax.shard_map(
        of_device,
        in_specs=(whole, whole, whole, cut, PartitionSpec(axes)),
        out_specs=((whole, whole), (cut, whole)),
        axis_names=set(axes),
        check_vma=False,
    )(trained, frozen, key, tokens, devices)


def _token_axes(shape: tuple[int, ...]) -> tuple[PartitionSpec, tuple[str, ...]]:
    """How the ambient mesh cuts `[batch, seq]`, and by which of its axes."""
    cut = spec(shape, ("batch", "seq"), ambient_mesh())
    return cut, tuple(axis for part in cut if part for axis in ([part] if isinstance(part, str) else part))


@dataclass(frozen=True)
class _Chunks:
    """A device's tokens in chunks, the last one filled up with zeros."""

    tokens: int
    vocab: int

    @property
    def size(self) -> int:
        return chunk_tokens(self.tokens, self.vocab)

    @property
    def number(self) -> int:
        return math.ceil(self.tokens / self.size)

    def cut(self, array: Array) -> Array:
        """`[batch, seq, ...]` -> `[number, size, ...]`."""
        flat = array.reshape(self.tokens, *array.shape[2:])
        padding = [(0, self.number * self.size - self.tokens)] + [(0, 0)] * (flat.ndim - 1)
        return jnp.pad(flat, padding).reshape(self.number, self.size, *flat.shape[1:])

    def join(self, array: Array) -> Array:
        """`[number, size, ...]` -> `[tokens, ...]`."""
        return array.reshape(-1, *array.shape[2:])[: self.tokens]


def _own_key(key: PRNGKeyArray | None, index: Array) -> PRNGKeyArray | None:
    return None if key is None else jax.random.fold_in(key, index)


def _sums_of_device(
    rule: _Rule, trained: PyTree, frozen: PyTree, key: PRNGKeyArray | None, tokens: _Tokens
) -> tuple[_Sums, _Gradients]:
    """The sums and the gradients, chunk by chunk; those of parameters are float32."""
    chunks = _Chunks(tokens[1].size, len(combine(trained, frozen)["head"]))

    def step(carry: PyTree, chunk: tuple[Array, _Tokens]) -> tuple[PyTree, Array | None]:
        index, tokens = chunk
        sums, (dx, grads) = _sums_of_chunk(rule, trained, frozen, _own_key(key, index), tokens)
        return jax.tree.map(jnp.add, carry, (sums, grads)), dx

    zeros = jax.tree.map(lambda param: jnp.zeros(param.shape, jnp.float32), trained)
    start = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)), zeros
    (sums, grads), dx = jax.lax.scan(step, start, (jnp.arange(chunks.number), jax.tree.map(chunks.cut, tokens)))
    if dx is not None:
        dx = chunks.join(dx).reshape(tokens[0].shape)
    return sums, (dx, grads)


def _sums_of_chunk(
    rule: _Rule, trained: PyTree, frozen: PyTree, key: PRNGKeyArray | None, tokens: _Tokens
) -> tuple[_Sums, _Gradients]:
    """The sums and the gradients of one chunk, `[tokens, hidden]`, `[tokens]` and `[tokens]`."""
    x, targets, is_target = tokens
    head = combine(trained, frozen)["head"]

    def adjusted(logits: Array, x: Array, trained: PyTree) -> Array:
        params = combine(trained, frozen)
        return rule.adjust(logits, x, params["head"], params["adapters"], key)

    # Said here, since differentiation calls this from elsewhere.
    with precise(x.dtype):
        logits = constrain(project(x, head, jnp.float32), None, "heads")
        logits, pull_back = jax.vjp(adjusted, logits, x, trained)
        sums, slopes = _cross_entropy(rule.label_smoothing, logits, targets, is_target)
        slopes, dx, grads = pull_back(slopes)
        # Products of two 16-bit arrays are several times as quick as those with a float32 one.
        slopes = slopes.astype(x.dtype)
        if trained["head"] is not None:
            grads = {**grads, "head": grads["head"] + contract(slopes, x, (0,), (0,))}
        dx = (dx + contract(slopes, head, (1,), (0,))).astype(x.dtype) if rule.x_trains else None
    return sums, (dx, grads)


def _cross_entropy(
    label_smoothing: float,
    logits: Float[Array, "tokens vocab"],
    targets: Int[Array, "tokens"],
    is_target: Bool[Array, "tokens"],
) -> tuple[_Sums, Float[Array, "tokens vocab"]]:
    """The sums, and the gradient of the loss with respect to the logits."""
    vocab = logits.shape[-1]
    losses, normalizer, guesses = _token_losses(logits, targets)
    tokens = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    slopes = jnp.exp(logits - normalizer) - (1 - label_smoothing) * (tokens == targets[:, None])
    if label_smoothing:
        uniform = normalizer[:, 0] - jnp.mean(logits, axis=-1)
        losses = (1 - label_smoothing) * losses + label_smoothing * uniform
        slopes -= label_smoothing / vocab
    sums = jnp.sum(losses, where=is_target), jnp.sum(is_target & (guesses == targets))
    return sums, jnp.where(is_target[:, None], slopes, 0)


def _token_losses(
    logits: Float[Array, "tokens vocab"], targets: Int[Array, "tokens"]
) -> tuple[Float[Array, "tokens"], Float[Array, "tokens 1"], Int[Array, "tokens"]]:
    """-log softmax(logits)[target], the log of the softmax's denominator, and the most likely token."""
    largest = jnp.max(logits, axis=-1, keepdims=True)
    normalizer = jnp.log(jnp.sum(jnp.exp(logits - largest), axis=-1, keepdims=True)) + largest
    losses = normalizer - jnp.take_along_axis(logits, targets[:, None], axis=-1)
    return losses[:, 0], normalizer, likeliest(logits, largest)
