"""`Phi3ForCausalLM`: the frozen model; an adapter, where there is one, is an argument beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray

from phi3_jax.config.model import Phi3Config
from phi3_jax.model.cache import Cache, empty_cache
from phi3_jax.model.cached_forward import cached_forward
from phi3_jax.model.documents import default_positions
from phi3_jax.model.dropout import DropKey, DropoutKey
from phi3_jax.model.ids import check_input_ids
from phi3_jax.model.layers import ROWS, Linear
from phi3_jax.model.logits import adapted_logits
from phi3_jax.model.products import precise, project
from phi3_jax.model.protocols import Adapters, AdapterSet, State, materialised
from phi3_jax.model.transformer import Phi3Model
from phi3_jax.parallel.sharding import constrain
from phi3_jax.system.errors import InputError


class ForwardOptions(TypedDict, total=False):
    """What a pass through the model takes beside its tokens; `Phi3ForCausalLM.__call__` says what each is."""

    attention_mask: Int[ArrayLike, "batch seq"] | None
    positions: Int[ArrayLike, "batch seq"] | None
    segment_ids: Int[ArrayLike, "batch seq"] | None
    lora: AdapterSet | None
    inputs_embeds: Float[Array, "batch seq hidden"] | None
    logits_to_keep: Int[ArrayLike, "kept"] | None
    dropout_key: DropKey | None
    remat: bool | str
    chunk_mlp: int | str


class Phi3ForCausalLM(nnx.Module):
    """Phi-3 with its language-model head.

    Args:
        config: the architecture.
        dtype: of the weights and activations; norms' statistics, RoPE, softmax and logits are
            float32 in any case.
        rngs: for random weights; `from_pretrained` loads a checkpoint instead.
        attention: the kernel, see `model.attention.attend`.

    Example:
        >>> import jax.numpy as jnp, phi3_jax as p3
        >>> from flax import nnx
        >>> sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        >>> config = p3.Phi3Config(**sizes, num_attention_heads=2, num_key_value_heads=1)
        >>> model = p3.Phi3ForCausalLM(config, rngs=nnx.Rngs(0))
        >>> model(jnp.array([[1, 5, 9], [1, 7, 2]])).shape
        (2, 3, 40)
    """

    def __init__(self, config: Phi3Config, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs, attention: str = "auto"):
        self.config = config
        self.attention = attention
        self.model = Phi3Model(config, dtype, rngs)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(config.hidden_size, config.vocab_size, config.initializer_range, dtype, rngs)
        )

    # Of files a model knows nothing: `phi3_jax.hf.pretrained` binds both, and `phi3_jax.Phi3ForCausalLM` has them.
    from_pretrained: ClassVar[Callable[..., Phi3ForCausalLM]]
    save_pretrained: ClassVar[Callable[..., None]]

    @property
    def dtype(self) -> jnp.dtype:
        """That of weights and activations."""
        dtype: jnp.dtype = self.model.embed_tokens.weight.dtype
        return dtype

    def embed(
        self, input_ids: Int[ArrayLike, "batch seq"], lora: AdapterSet | None = None
    ) -> Float[Array, "batch seq hidden"]:
        """The input embeddings, with the adapter's update where it has one for them.

        An id that has no row is read as another one: padding may have any.
        """
        adapter = materialised(lora, "model").get("embed_tokens")
        return self.with_saved(lora).model.embed_tokens(jnp.asarray(input_ids), adapter)

    def with_saved(self, lora: AdapterSet | None) -> Phi3ForCausalLM:
        """The model with the weights that `lora` replaces as a whole (`modules_to_save`)."""
        if lora is None or not lora.saved:
            return self
        # Of a shared table each half is trained, and kept, on its own.
        splits_tables = not lora.saved.keys().isdisjoint(("lm_head", "model.embed_tokens"))
        model = untied(self) if self.lm_head is None and splits_tables else self
        graph, state = nnx.split(model)
        weights = dict(nnx.to_flat_state(state))
        for name, weight in lora.saved.items():
            path = (*name.split("."), "weight")
            weights[path] = weights[path].replace(weight.astype(self.dtype))
        return nnx.merge(graph, nnx.from_flat_state(weights))

    @overload
    def __call__(
        self, input_ids: Int[ArrayLike, "batch seq"], *, cache: None = None, **options: Unpack[ForwardOptions]
    ) -> Float[Array, "batch kept vocab"]: ...

    @overload
    def __call__(
        self, input_ids: Int[ArrayLike, "batch seq"], *, cache: Cache, **options: Unpack[ForwardOptions]
    ) -> tuple[Float[Array, "batch kept vocab"], Cache]: ...

    def __call__(
        self,
        input_ids: Int[ArrayLike, "batch seq"],
        *,
        attention_mask: Int[ArrayLike, "batch seq"] | None = None,
        positions: Int[ArrayLike, "batch seq"] | None = None,
        segment_ids: Int[ArrayLike, "batch seq"] | None = None,
        lora: AdapterSet | None = None,
        cache: Cache | None = None,
        inputs_embeds: Float[Array, "batch seq hidden"] | None = None,
        logits_to_keep: Int[ArrayLike, "kept"] | None = None,
        dropout_key: DropKey | None = None,
        remat: bool | str = False,
        chunk_mlp: int | str = "auto",
    ) -> Float[Array, "batch kept vocab"] | tuple[Float[Array, "batch kept vocab"], Cache]:
        """Logits in float32; with a cache, a pair of them and the cache to go on with.

        Args:
            input_ids: token ids.
            attention_mask: 1 at real tokens, 0 at padding, on either side.
            positions: default: counted from 0 at each row's (or segment's) first real token.
            segment_ids: documents of a packed row, counted from 1; 0 at padding. Attention stays
                within a document.
            lora: adapters to apply; `per_row(...)` for another one in each row.
            cache: from `make_cache`, or from the call before: what was read so far, which `input_ids` follow.
                Only the first call takes an `attention_mask`, with padding on the left.
            inputs_embeds: taken instead of `embed(input_ids, lora)`.
            logits_to_keep: the places in the sequence whose logits are wanted; default: all.
            dropout_key: training mode: dropout of the configuration and of the adapters. A `DropoutKey` where
                this is part of a batch.
            remat: recompute each layer in the backward pass instead of keeping its activations; True, or
                the name of a policy, see `model.remat.remat_policy`.
            chunk_mlp: how many pieces a row is cut into where each position is worked on by itself, `none`, or
                `auto`, as long rows need, see `model.sequence.piece_count`.

        Raises:
            InputError: for arguments that exclude each other, for a cache without room, and for an id that the
                embedding has no row for, unless it is an argument of what `jax.jit` compiles.
        """
        for name, given in (("attention_mask", attention_mask), ("segment_ids", segment_ids)):
            if given is not None and jnp.shape(given) != jnp.shape(input_ids):
                raise InputError(
                    f"{name} has shape {jnp.shape(given)}, expected that of input_ids, {jnp.shape(input_ids)}; "
                    "documents that do not see each other are told apart by segment_ids"
                )
        self._check_ids(
            input_ids,
            {"attention_mask": attention_mask, "segment_ids": segment_ids, "inputs_embeds": inputs_embeds},
        )
        if cache is not None:
            self._check_room(cache, input_ids)
        out: Array | tuple[Array, Cache] = _forward(
            *nnx.split(self),
            input_ids,
            attention_mask=attention_mask,
            positions=positions,
            segment_ids=segment_ids,
            lora=lora,
            cache=cache,
            inputs_embeds=inputs_embeds,
            logits_to_keep=logits_to_keep,
            dropout_key=dropout_key,
            remat=remat,
            chunk_mlp=chunk_mlp,
        )
        return out

    def make_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `batch` rows that will be `length` columns long, padding and answer included.

        LongRoPE has other factors from `original_max_position_embeddings` on: what was read before then has to
        be read again for an answer as `generate` gives it, which does so.

        Example:
            >>> import jax.numpy as jnp
            >>> from flax import nnx
            >>> from phi3_jax import Phi3Config, Phi3ForCausalLM
            >>> sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
            >>> config = Phi3Config(**sizes, num_attention_heads=2, num_key_value_heads=1)
            >>> model = Phi3ForCausalLM(config, rngs=nnx.Rngs(0))
            >>> logits, cache = model(jnp.array([[1, 5, 9]]), cache=model.make_cache(1, 8))
            >>> logits, cache = model(jnp.array([[7]]), cache=cache)
            >>> logits.shape, int(cache.length)
            ((1, 1, 40), 4)
        """
        return empty_cache(self.config, batch, length, self.dtype)

    def _check_ids(self, input_ids: Int[ArrayLike, "batch seq"], options: ForwardOptions) -> None:
        if options.get("inputs_embeds") is None:
            padding = options.get("attention_mask"), options.get("segment_ids")
            check_input_ids(self.config.vocab_size, input_ids, *padding)

    def _check_room(self, cache: Cache, input_ids: Int[ArrayLike, "batch seq"]) -> None:
        window, length = self.config.sliding_window, cache.length
        if (window is not None and cache.capacity == window) or isinstance(length, jax.core.Tracer):
            return
        if int(length) + jnp.shape(input_ids)[1] > cache.capacity:
            raise InputError(
                f"the cache has room for {cache.capacity} columns, {int(length)} of which are taken, and "
                f"{jnp.shape(input_ids)[1]} more were given; make one of another length"
            )

    def hidden_states(
        self, input_ids: Int[ArrayLike, "batch seq"], **options: Unpack[ForwardOptions]
    ) -> Float[Array, "layers_and_1 batch seq hidden"]:
        """As transformers' `output_hidden_states`: each layer's input, then the normed output.

        Takes the arguments of the call.
        """
        self._check_ids(input_ids, options)
        out: Array = _forward(*nnx.split(self), input_ids, output="layers", **options)
        return out

    def last_hidden_state(
        self, input_ids: Int[ArrayLike, "batch seq"], **options: Unpack[ForwardOptions]
    ) -> Float[Array, "batch seq hidden"]:
        """The normed output of the last layer, which `logits` takes. Takes the arguments of the call."""
        self._check_ids(input_ids, options)
        out: Array = _forward(*nnx.split(self), input_ids, output="hidden", **options)
        return out

    def logits(
        self,
        x: Float[Array, "batch seq hidden"],
        lora: AdapterSet | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch seq vocab"]:
        """The output head's logits, float32, for any positions of `last_hidden_state`."""
        head, adapters = self.head(lora)
        with precise(self.dtype):
            return adapted_logits(project(x, head, jnp.float32), x, head, adapters, dropout_key)

    def head(self, lora: AdapterSet | None = None) -> tuple[Float[Array, "vocab hidden"], Adapters]:
        """The output head's weight, or the embedding's where they are one, and its adapters: what
        `adapted_logits` takes."""
        model, adapters = self.with_saved(lora), materialised(lora)
        found = {"lm_head": adapters.get("lm_head")}
        if model.lm_head is None:
            found["embed_tokens"] = adapters.get("model", {}).get("embed_tokens")
        weight = (model.model.embed_tokens if model.lm_head is None else model.lm_head).weight[...]
        return constrain(weight, *ROWS), {name: adapter for name, adapter in found.items() if adapter is not None}


# Compiled here, so that also those who call the model without jit get one program a shape.
@partial(jax.jit, static_argnums=0, static_argnames=("remat", "chunk_mlp", "output"))
def _forward(
    graph: nnx.GraphDef[Phi3ForCausalLM],
    state: State,
    input_ids: Array,
    *,
    attention_mask: Array | None = None,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    lora: AdapterSet | None = None,
    cache: Cache | None = None,
    inputs_embeds: Array | None = None,
    logits_to_keep: Array | None = None,
    dropout_key: DropKey | None = None,
    remat: bool | str = False,
    chunk_mlp: int | str = "auto",
    output: Literal["logits", "hidden", "layers"] = "logits",
) -> Array | tuple[Array, Cache]:
    """The logits, the normed output of the last layer, or every layer's input before it; and the cache, with one."""
    self = nnx.merge(graph, state).with_saved(lora)
    input_ids = jnp.asarray(input_ids)
    if input_ids.ndim != 2:
        raise InputError(f"input_ids have shape {input_ids.shape}, expected [batch, seq]")
    if attention_mask is not None and segment_ids is not None:
        raise InputError("attention_mask and segment_ids were both given; segment_ids are 0 at padding already")
    if dropout_key is not None:
        self.config.check_trainable()
    adapters = materialised(lora, "model")
    if cache is not None:
        _check_cached(cache, attention_mask, positions, segment_ids, dropout_key, output)
        with precise(self.dtype):
            x = self.embed(input_ids, lora) if inputs_embeds is None else inputs_embeds
            x, cache = cached_forward(self.model, x, attention_mask, adapters, cache, self.attention)
        x = x if logits_to_keep is None else x[:, logits_to_keep]
        return (x if output == "hidden" else self.logits(x, lora)), cache
    if segment_ids is None:
        segment_ids = jnp.ones_like(input_ids) if attention_mask is None else attention_mask.astype(jnp.int32)
    if positions is None:
        positions = default_positions(segment_ids)
    with precise(self.dtype):
        x = self.embed(input_ids, lora) if inputs_embeds is None else inputs_embeds
        x = constrain(x, "batch", "seq", None)
        x, inputs = self.model(
            x, positions, segment_ids, adapters, dropout_key, self.attention, remat, output == "layers", chunk_mlp
        )
    if inputs is not None:
        return jnp.concatenate([inputs, x[None]])
    if logits_to_keep is not None:
        x = x[:, logits_to_keep]
    head_key = dropout_key.key if isinstance(dropout_key, DropoutKey) else dropout_key
    return x if output == "hidden" else self.logits(x, lora, head_key)


def _check_cached(
    cache: Cache,
    mask: Array | None,
    positions: Array | None,
    segments: Array | None,
    dropout_key: DropKey | None,
    output: str,
) -> None:
    given = {"positions": positions, "segment_ids": segments, "dropout_key": dropout_key}
    for name, value in given.items():
        if value is not None:
            raise InputError(
                f"{name} and a cache were both given; a cache is for reading on, without packing or dropout"
            )
    if mask is not None and not cache.empty:
        raise InputError(
            "an attention_mask was given with a cache that has been read into; only the prompt has padding"
        )
    if output == "layers":
        raise InputError("hidden_states takes no cache; leave it out")


def untied(model: Phi3ForCausalLM) -> Phi3ForCausalLM:
    """The same model with an output head of its own, a copy of the embedding that was its head."""
    config = replace(model.config, tie_word_embeddings=False)
    make = partial(type(model), config, dtype=model.dtype, attention=model.attention)
    graph = nnx.graphdef(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    weights = dict(nnx.to_flat_state(nnx.state(model)))
    table = weights[("model", "embed_tokens", "weight")]
    weights[("lm_head", "weight")] = table.replace(table.get_value())  # a variable of its own, the same array
    merged: Phi3ForCausalLM = nnx.merge(graph, nnx.from_flat_state(weights))
    return merged
