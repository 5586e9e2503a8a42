"""A batch in which each row uses another adapter, or none."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from phi3_jax.lora.adapters import STATIC, AnyAdapter, LoraLinear
from phi3_jax.lora.stack import STACK
from phi3_jax.lora.tree import Lora, refuse_saved, refuse_shapes
from phi3_jax.model.dropout import DropKey, dropout
from phi3_jax.model.protocols import Adapters
from phi3_jax.system.dotted import flat_items, nested
from phi3_jax.system.errors import InputError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraRows:
    """Adapters of which each row of a batch uses one; see `per_row`. The model takes it as it takes a `Lora`.

    Attributes:
        loras: The adapters.
        rows: For each row of the batch the place in `loras`, -1 for none.
    """

    loras: tuple[Lora, ...]
    rows: Int[Array, "batch"]

    @property
    def saved(self) -> dict[str, Array]:
        """Weights that take the place of the base's: none, since the rows of a batch share them."""
        return {}

    def materialise(self) -> Adapters:
        """The adapters as the model takes them, see `Lora.materialise`."""
        found: dict[str, list[tuple[int, AnyAdapter]]] = {}
        for index, lora in enumerate(self.loras):
            for name, adapter in flat_items(lora.materialise()):
                found.setdefault(name, []).append((index, adapter))
        return nested({name: _by_row(name, adapters, self.rows) for name, adapters in found.items()})


def per_row(loras: Sequence[Lora], rows: Int[ArrayLike, "batch"]) -> LoraRows:
    """Adapters for a batch in which each row uses another, as PEFT's `adapter_names`.

    `model(ids, lora=per_row([a, b], [0, 1, -1]))` runs the first row with `a`, the second with `b` and
    the third with the base alone. Another assignment of rows does not compile the model again. The
    adapters may differ in kind, targets and rank. Gradients go through to `loras`.

    Args:
        loras: The adapters.
        rows: For each row of the batch the place of its adapter in `loras`; -1 for none.

    Returns:
        What the model takes for `lora`.

    Raises:
        InputError: Without adapters, for those with `modules_to_save`, and for places that do not exist
            (unknown where `rows` is traced; then the base runs alone). A batch of another length raises
            it when the model is called.

    Example:
        >>> import phi3_jax as p3
        >>> from flax import nnx
        >>> sizes = dict(vocab_size=9, hidden_size=16, intermediate_size=8, num_hidden_layers=2, head_dim=8)
        >>> config = p3.Phi3Config(**sizes, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)
        >>> model = p3.Phi3ForCausalLM(config, rngs=nnx.Rngs(0))
        >>> loras = [p3.init_lora(model, p3.LoraConfig(r=2), jax.random.key(seed)) for seed in (0, 1)]
        >>> model(jnp.ones((3, 4), int), lora=p3.per_row(loras, [1, 0, -1])).shape
        (3, 4, 9)
    """
    if not loras:
        raise InputError("there are no adapters for the rows; give at least one, or leave lora out")
    for lora in loras:
        refuse_saved(lora, "by row")
    rows = jnp.asarray(rows)
    if rows.ndim != 1 or not jnp.issubdtype(rows.dtype, jnp.integer):
        raise InputError(f"rows is {rows.dtype} of shape {rows.shape}, expected one whole number for each row")
    if not isinstance(rows, jax.core.Tracer):
        wrong = [row for row in rows.tolist() if not -1 <= row < len(loras)]
        if wrong:
            raise InputError(f"rows has {wrong[0]}, expected 0 to {len(loras) - 1} or -1 for the base alone")
    return LoraRows(tuple(loras), rows)


def _by_row(name: str, adapters: list[tuple[int, AnyAdapter]], rows: Int[Array, "batch"]) -> "LinearRows | ChosenRows":
    owners, kinds = zip(*adapters, strict=True)
    if name.startswith(STACK):
        # The model's scan hands each layer its own slice of everything.
        rows = jnp.broadcast_to(rows, (jax.tree.leaves(kinds[0])[0].shape[0], *rows.shape))
    plain = [kind for kind in kinds if isinstance(kind, LoraLinear) and kind.lora_bias is None]
    if len(plain) < len(kinds) or len({kind.dropout for kind in plain}) > 1:
        return ChosenRows(kinds, rows, owners)
    shapes = {(*kind.lora_B.shape[:-1], kind.lora_A.shape[-1]) for kind in plain}
    if len(shapes) > 1:
        refuse_shapes(name, shapes)
    return LinearRows(
        jnp.concatenate([kind.lora_A for kind in plain], axis=-2),
        jnp.concatenate([kind.lora_B for kind in plain], axis=-1),
        rows,
        tuple(owner for owner, kind in zip(owners, plain, strict=True) for _ in range(kind.rank)),
        tuple(kind.scaling for kind in plain for _ in range(kind.rank)),
        plain[0].dropout,
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LinearRows:
    """Plain adapters of one linear layer side by side, as one of the sum of their ranks.

    What a row has of the ranks of other adapters than its own is masked, so that two matrix products do
    for all.

    Attributes:
        lora_A: `[*stack, R, in]`.
        lora_B: `[*stack, out, R]`.
        rows: As in `LoraRows`, for each layer.
        owners: For each of the R ranks the adapter that it belongs to.
        scalings: For each of the R ranks the scale.
        dropout: As in `LoraLinear`.
    """

    lora_A: Float[Array, "*stack R in"]
    lora_B: Float[Array, "*stack out R"]
    rows: Int[Array, "*stack batch"]
    owners: tuple[int, ...] = field(metadata=STATIC)
    scalings: tuple[float, ...] = field(metadata=STATIC)
    dropout: float = field(metadata=STATIC)

    @jax.named_scope("lora")
    def __call__(
        self,
        y: Float[Array, "batch *rest out"],
        x: Float[Array, "batch *rest in"],
        weight: Float[Array, "out in"] | None,
        key: DropKey | None = None,
    ) -> Float[Array, "batch *rest out"]:
        del weight
        mine = _rows_like(self.rows, y) == np.asarray(self.owners)  # [batch, 1, R]
        down = dropout(x.astype(self.lora_A.dtype), self.dropout, key) @ self.lora_A.T
        scales = np.asarray(self.scalings, down.dtype)
        return (y + (down * jnp.where(mine, scales, 0)) @ self.lora_B.T).astype(y.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ChosenRows:
    """Adapters of any kinds of one module: each is computed for the whole batch, and of the results each row
    takes its own.

    Attributes:
        adapters: Of one module, of any kinds.
        rows: As in `LoraRows`, for each layer.
        owners: The places of `adapters` in `LoraRows.loras`.
    """

    adapters: tuple[AnyAdapter, ...]
    rows: Int[Array, "*stack batch"]
    owners: tuple[int, ...] = field(metadata=STATIC)

    @jax.named_scope("lora")
    def __call__(self, y: Float[Array, "batch *rest"], *inputs: Any) -> Float[Array, "batch *rest"]:
        """The layer's output, or the embedding's rows; `inputs` is what these kinds of adapter take."""
        return self._chosen(y, lambda adapter: adapter(y, *inputs))

    def tied_logits(
        self, logits: Float[Array, "batch *rest vocab"], x: Float[Array, "batch *rest hidden"]
    ) -> Float[Array, "batch *rest vocab"]:
        """See `EmbeddingAdapter`."""
        return self._chosen(logits, lambda adapter: adapter.tied_logits(logits, x))

    def _chosen(self, y: Array, run: Callable[[Any], Array]) -> Array:
        rows, chosen = _rows_like(self.rows, y), y
        for owner, adapter in zip(self.owners, self.adapters, strict=True):
            chosen = jnp.where(rows == owner, run(adapter), chosen)
        return chosen


def _rows_like(rows: Int[Array, "batch"], y: Float[Array, "batch *rest"]) -> Int[Array, "batch *ones"]:
    if rows.shape[0] != y.shape[0]:
        raise InputError(f"rows has {rows.shape[0]} entries for a batch of {y.shape[0]} rows; give one for each row")
    return rows.reshape(-1, *(1 for _ in y.shape[1:]))
