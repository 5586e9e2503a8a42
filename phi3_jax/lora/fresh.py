"""Fresh adapters, drawn from PEFT's distributions or computed from the base's weights."""

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from phi3_jax.config.lora import LoraConfig
from phi3_jax.config.peft_object import PeftConfig, as_lora_config
from phi3_jax.lora.adapters import (
    DoraEmbedding,
    DoraLinear,
    HeadRows,
    LoraEmbedding,
    LoraLinear,
    StackableAdapter,
    TokenRows,
)
from phi3_jax.lora.base_weights import holds_quantized, map_weights, saved_weight, weight_rows
from phi3_jax.lora.describe import described
from phi3_jax.lora.fused import slice_table
from phi3_jax.lora.initialisers import AandB, olora, pissa, residual
from phi3_jax.lora.stack import ByLayer, ModuleAdapter
from phi3_jax.lora.targets import Module, config_targets, saved_modules
from phi3_jax.lora.tree import Lora
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.system.errors import InputError


def init_lora(model: Phi3ForCausalLM, config: LoraConfig | PeftConfig, key: PRNGKeyArray) -> Lora:
    """Adapters for the modules that `config.target_modules` names, in float32 whatever the base's type.

    Before training they change nothing (but with `init_lora_weights=False`). The numbers depend on
    `key` and on a module's name and shape, not on which other modules have adapters.

    Args:
        model: The base. Of an abstract one (`nnx.eval_shape`) only shapes are known, which is enough but for
            DoRA, PiSSA, OLoRA, `modules_to_save` and `trainable_token_indices`.
        config: Which modules, of which rank, scale and kind; PEFT's own LoraConfig will do, with PEFT's defaults.
        key: What everything random is drawn from.

    Raises:
        InputError: Where a setting matches nothing (see `config_targets`), for what PEFT's configuration has and
            nothing here does, and for the initialisers that need more than the model: `eva` (`eva_init`, which sees
            data) and `loftq` (`loftq_init`, which quantises the base).

    Example:
        >>> import phi3_jax as p3
        >>> from flax import nnx
        >>> sizes = dict(vocab_size=9, hidden_size=16, intermediate_size=8, num_hidden_layers=2, head_dim=8)
        >>> config = p3.Phi3Config(**sizes, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)
        >>> model = p3.Phi3ForCausalLM(config, rngs=nnx.Rngs(0))
        >>> lora = p3.init_lora(model, p3.LoraConfig(r=4, target_modules=["o_proj", "lm_head"]), jax.random.key(0))
        >>> {name: adapter.lora_A.shape for name, adapter in lora.items()}
        {'model.layers.self_attn.o_proj': (2, 4, 16), 'lm_head': (4, 16)}
    """
    config = as_lora_config(config)
    if config.init_lora_weights in ("eva", "loftq"):
        name = config.init_lora_weights
        raise InputError(f"init_lora_weights is {name}, which {name}_init computes, not init_lora; call that")
    modules = config_targets(model, config)
    return assemble(model, config, modules, {m.name: init_module(model, m, config, key) for m in modules})


def assemble(
    model: Phi3ForCausalLM, config: LoraConfig, modules: Sequence[Module], adapters: Mapping[str, ModuleAdapter]
) -> Lora:
    """The whole of it: `adapters` for `modules`, and what else the configuration trains, as the base has it."""
    adapters = {**adapters, **_token_rows(model, config, adapters)}
    saved = {name: saved_weight(model, name) for name in saved_modules(model, config.modules_to_save or ())}
    parts = {name: part for name, part in slice_table(model).items() if name in adapters}
    return Lora.from_items(adapters, resolved(config, modules, model.config.num_hidden_layers, saved), saved, parts)


def resolved(config: LoraConfig, modules: Iterable[Module], num_layers: int, saved: Iterable[str] = ()) -> LoraConfig:
    """The configuration with the modules found in place of the expressions that found them (see `described`)."""
    found = {name: config.rank_and_alpha(name) for module in modules for name in module.names}
    return described(config, found, num_layers, saved)


def init_module(model: Phi3ForCausalLM, module: Module, config: LoraConfig, key: PRNGKeyArray) -> ModuleAdapter:
    """The adapter of one module."""
    # A checksum, since Python's own hash of a string differs from run to run.
    key = jax.random.fold_in(key, zlib.crc32(module.name.encode()))

    if module.is_embedding:
        return _init_embedding(model, module, config, key)

    def make(part: Module, r: int, alpha: float, index: int) -> StackableAdapter:
        # The first group of layers has the numbers that all layers have where they do not differ.
        return _init(model, part, config, r, alpha, jax.random.fold_in(key, index) if index else key)

    return by_layer_groups(module, config, model.config.num_hidden_layers, make)


def by_layer_groups(
    module: Module, config: LoraConfig, num_layers: int, make: Callable[[Module, int, float, int], StackableAdapter]
) -> StackableAdapter | ByLayer:
    """`make(module, r, α, 0)`, or where the layers of a stacked module differ, or some have no adapter, a
    `ByLayer` of what it makes of each group of equal ones.
    """
    if not module.layers:
        return make(module, *config.rank_and_alpha(module.name), 0)
    groups: dict[tuple[int, float], set[str]] = {}  # in the order of the first of each
    for name in module.names:
        groups.setdefault(config.rank_and_alpha(name), set()).add(name)
    if len(groups) == 1 and len(module.layers) == num_layers:
        return make(module, *next(iter(groups)), 0)
    alike = [(part, *key) for key, names in groups.items() if (part := module.narrowed(names)) is not None]
    parts = tuple(make(part, r, alpha, i) for i, (part, r, alpha) in enumerate(alike))
    return ByLayer(parts, tuple(part.layers for part, _, _ in alike), num_layers)


def _init(
    model: Phi3ForCausalLM, module: Module, config: LoraConfig, r: int, alpha: float, key: PRNGKeyArray
) -> StackableAdapter:
    scaling = config.scaling_of(r, alpha)
    if config.is_residual:
        _check_directions(model, module, config, r)
        initialiser = olora if config.init_lora_weights == "olora" else pissa(str(config.init_lora_weights), key)
        initial = map_weights(model, module, partial(initialiser, r=r, scaling=scaling))
        return residual(initial, scaling, config.lora_dropout)
    a, b = _random_a_and_b(module, config.init_lora_weights, r, key)
    if config.use_dora:
        # m starts at ‖V‖: that of the base where B is zero.
        magnitude = map_weights(model, module, _row_norms, LoraLinear(a, b, scaling))
        return DoraLinear(a, b, magnitude, scaling, config.lora_dropout)
    bias = jnp.zeros(b.shape[:-1], jnp.float32) if config.lora_bias else None
    return LoraLinear(a, b, scaling, config.lora_dropout, bias)


def _check_directions(model: Phi3ForCausalLM, module: Module, config: LoraConfig, r: int) -> None:
    name = config.init_lora_weights
    if r > min(module.shape):
        raise InputError(
            f"r is {r}, but init_lora_weights {name} finds only {min(module.shape)} directions in {module.suffix} "
            f"({module.shape[0]}×{module.shape[1]}); lower r"
        )
    if str(name).startswith("pissa") and holds_quantized(model, module.parent):
        raise InputError(
            f"init_lora_weights {name} needs the unquantised weights of {module.suffix}; leave quantization out, or "
            "give loftq"
        )


def _row_norms(weight: Float[Array, "out in"], plain: LoraLinear) -> Float[Array, "out"]:
    return jnp.asarray(jnp.linalg.norm(plain.merged(weight), axis=1))


def _itself(weight: Array) -> Array:
    return weight


def _random_a_and_b(module: Module, initialiser: bool | str, r: int, key: PRNGKeyArray) -> AandB:
    """PEFT's A and B of a linear layer (`LoraLayer.reset_lora_parameters`, `orthogonal_init`).

    - True: A Kaiming-uniform with a = √5, that is uniform in ±1/√in; B zero.
    - `"gaussian"`: A normal with standard deviation 1/r; B zero.
    - `"orthogonal"`: A = (X Q_o)ᵀ/10, B = Y Q_e/10 with X, Y normal and Q_o, Q_e every other row of
      an orthogonal r × r matrix, so that B A is zero although neither is.
    - False: A as with True and B by the same rule, uniform in ±1/√r.
    """
    out_features, in_features = module.shape
    a_key, b_key = jax.random.split(key)
    a_shape = (*module.stack, r, in_features)
    b_shape = (*module.stack, out_features, r)
    if initialiser == "orthogonal":
        q_key, key = jax.random.split(key)
        q = jnp.linalg.qr(jax.random.normal(q_key, (*module.stack, r, r), jnp.float32))[0]
        x_key, y_key = jax.random.split(key)
        x = jax.random.normal(x_key, (*module.stack, in_features, r // 2), jnp.float32)
        y = jax.random.normal(y_key, (*module.stack, out_features, r // 2), jnp.float32)
        return jnp.swapaxes(x @ q[..., 0::2, :], -1, -2) / 10, y @ q[..., 1::2, :] / 10
    if initialiser == "gaussian":
        a = jax.random.normal(a_key, a_shape, jnp.float32) / r
    else:
        a = _uniform(a_key, a_shape, 1 / math.sqrt(in_features))
    b = jnp.zeros(b_shape, jnp.float32)
    if initialiser is False:
        b = _uniform(b_key, b_shape, 1 / math.sqrt(r))
    return a, b


def _init_embedding(
    model: Phi3ForCausalLM, module: Module, config: LoraConfig, key: PRNGKeyArray
) -> LoraEmbedding | DoraEmbedding:
    """PEFT's A and B of an embedding: A zero (random with False), B standard normal, for every setting.

    Raises:
        InputError: For what PEFT has for linear layers alone.
    """
    if config.lora_bias or config.init_lora_weights not in (True, False, "gaussian"):
        what = "lora_bias" if config.lora_bias else f"init_lora_weights {config.init_lora_weights}"
        raise InputError(f"{what} is not for embeddings; leave it out, or {module.suffix} out of target_modules")
    vocab, hidden = module.shape
    r, alpha = config.rank_and_alpha(module.name)
    scaling = config.scaling_of(r, alpha)
    a_key, b_key = jax.random.split(key)
    a = jnp.zeros((r, vocab), jnp.float32)
    if config.init_lora_weights is False:
        a = jax.random.normal(a_key, (r, vocab), jnp.float32)
    plain = LoraEmbedding(a, jax.random.normal(b_key, (hidden, r), jnp.float32), scaling)
    if not config.use_dora:
        return plain
    magnitude = jnp.linalg.norm(plain.merged(map_weights(model, module, _itself)), axis=0)
    return DoraEmbedding(plain.lora_A, plain.lora_B, magnitude, scaling)


def _token_rows(model: Phi3ForCausalLM, config: LoraConfig, adapters: Mapping[str, object]) -> dict[str, TokenRows]:
    """The rows of `trainable_token_indices`, as they are in the base.

    With tied embeddings the head uses those of `embed_tokens`.
    """
    wanted = token_modules(model, config)
    if wanted and model.lm_head is None and isinstance(adapters.get("lm_head"), DoraLinear):
        raise InputError(
            "trainable_token_indices trains rows of the table that lm_head shares in this model, and PEFT cannot run "
            "DoRA on such a head; leave lm_head out of target_modules"
        )
    rows: dict[str, TokenRows] = {}
    for name, ids in wanted.items():
        if name in adapters:
            raise InputError(
                f"trainable_token_indices trains rows of {name}, which target_modules gives an adapter: not "
                "supported; leave one out"
            )
        vocab = model.config.vocab_size
        if max(ids) >= vocab:
            raise InputError(f"trainable_token_indices has {max(ids)}, but {name} has {vocab} rows, 0 to {vocab - 1}")
        kind = HeadRows if name == "lm_head" else TokenRows
        rows[name] = kind(weight_rows(model, name, ids), ids)
    return rows


def token_modules(model: Phi3ForCausalLM, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Module -> token ids of `trainable_token_indices`.

    Raises:
        InputError: For modules other than embedding and head, and for other tokens of a tied head.
    """
    tokens = config.trainable_token_indices or {}
    by_module = tokens if isinstance(tokens, dict) else {"embed_tokens": tokens}
    known = {"embed_tokens": "model.embed_tokens", "model.embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}
    unknown = [name for name in by_module if name not in known]
    if unknown:
        raise InputError(f"trainable_token_indices names {unknown[0]}; expected embed_tokens or lm_head")
    named = {known[name]: ids for name, ids in by_module.items() if ids}
    if model.lm_head is None and "lm_head" in named:
        if named.get("model.embed_tokens") != named["lm_head"]:
            raise InputError(
                "trainable_token_indices names lm_head, which shares the embedding's table in this model; give the "
                "tokens for embed_tokens"
            )
        del named["lm_head"]
    return named


def _uniform(key: PRNGKeyArray, shape: tuple[int, ...], bound: float) -> jax.Array:
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
