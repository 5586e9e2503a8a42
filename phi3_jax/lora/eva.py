"""EVA: A starts as the principal components of what its layer is given, and ranks go where they explain most.

After the paper (https://arxiv.org/abs/2410.07170) and PEFT's `initialize_lora_eva_weights`.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from phi3_jax.config.lora import EVA_DEFAULTS, LoraConfig
from phi3_jax.config.peft_object import PeftConfig, as_lora_config
from phi3_jax.data.batch import Batch
from phi3_jax.lora.fresh import init_lora
from phi3_jax.lora.pca import IncrementalPCA
from phi3_jax.lora.stack import ByLayer
from phi3_jax.lora.targets import Module, checkpoint_name, config_targets
from phi3_jax.lora.tree import Lora
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.attention import without_cache
from phi3_jax.model.documents import default_positions, documents
from phi3_jax.model.observer import Observer
from phi3_jax.model.products import precise
from phi3_jax.model.rope import CosSin, rope_cos_sin
from phi3_jax.model.walk import Layer
from phi3_jax.system.dotted import nested
from phi3_jax.system.errors import InputError
from phi3_jax.system.numbers import is_number


def eva_init(
    model: Phi3ForCausalLM, config: LoraConfig | PeftConfig, batches: Iterable[Batch], key: PRNGKeyArray
) -> Lora:
    """Adapters whose A are principal components of their layers' inputs over `batches`, and whose B are zero.

    The sum of all ranks is that of the configuration; where components explain most of their layer's
    variance, a layer gets more of it (up to `rho` times its rank), others less or nothing. The result's
    `rank_pattern` and, with `adjust_scaling_factors`, `alpha_pattern` say so, and `target_modules` names
    the layers that are left. Batches are drawn until all components that are in use have converged
    (cosine with the ones before of at least `tau`), or there are no more, of which a warning tells.

    The model runs a layer at a time. Beside it and one layer's activations there are in memory all
    components, 4 · r · rho bytes for each column of every adapted weight (71 MB for Phi-3-mini at
    r = 16), and while those of a layer are computed, two float32 copies of what it is given (0.54 GB for
    8,192 tokens at `down_proj` of Phi-3-mini). A quantised base will do.

    As in PEFT, an embedding among the targets is initialised as usual, and its rank stays.

    Args:
        model: the base.
        config: with `init_lora_weights: eva`; `eva_config` has PEFT's settings. PEFT's own LoraConfig will do.
        batches: dictionaries of `input_ids` `[batch, seq]` and what else of `segment_ids`, `positions`
            or `attention_mask` applies. Padding does not count, nor, with `use_label_mask`, tokens whose
            `labels` are `label_mask_value` or whose `loss_mask` is 0. A batch with fewer tokens that count
            than components (r · rho) passes a layer by. They must not end too early for the settings: for
            PEFT's result, which goes over its data again until all has converged, give them without end.
        key: what is drawn where the SVD is a randomised one (layers with more than 2 · r · rho inputs).

    Returns:
        The adapters, with the configuration that describes them.

    Raises:
        InputError: for other initialisers, for settings out of range, where r · rho exceeds a layer's
            number of inputs, and where no batch has enough tokens that count.

    Example:
        >>> import jax, numpy as np, phi3_jax as p3
        >>> from flax import nnx
        >>> sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        >>> config = p3.Phi3Config(**sizes, num_attention_heads=2, num_key_value_heads=1)
        >>> model = p3.Phi3ForCausalLM(config, rngs=nnx.Rngs(0))
        >>> batches = [{"input_ids": np.arange(32).reshape(2, 16)}] * 2
        >>> settings = p3.LoraConfig(r=2, target_modules=("o_proj",), init_lora_weights="eva")
        >>> lora = p3.eva_init(model, settings, batches, jax.random.key(0))
        >>> float(abs(jax.tree.leaves(lora)[0]).max()) > 0
        True
    """
    config = as_lora_config(config)
    if config.init_lora_weights != "eva":
        raise InputError(f"init_lora_weights is {config.init_lora_weights}, expected eva; or call init_lora")
    settings = _settings(config)
    modules = [module for module in config_targets(model, config) if not module.is_embedding]
    if not modules:
        raise InputError("init_lora_weights is eva, but target_modules has no linear layer; name one")
    sources = _sources(modules, config, settings.rho)
    states = {name: source.fresh() for name, source in sources.items()}
    ranks, converged, seen = _collect(model, sources, states, batches, settings, key)
    if not all(converged.values()):
        warnings.warn(
            f"the data for init_lora_weights eva ended after {seen} batches, before the components of "
            f"{sum(not done for done in converged.values())} of {len(converged)} layers had converged; "
            "give more, or lower eva_config's tau",
            stacklevel=2,
        )
    components = {}
    for source_name, source in sources.items():
        for name in source.ranks:
            components[name] = states[source_name].initial_A(ranks[name], settings.whiten)
    return _lora(model, config, settings, modules, components, key)


@dataclass(frozen=True)
class _Settings:
    """PEFT's `EvaConfig`."""

    rho: float
    tau: float
    use_label_mask: bool
    label_mask_value: int
    whiten: bool
    adjust_scaling_factors: bool


def _settings(config: LoraConfig) -> _Settings:
    settings = _Settings(**{**EVA_DEFAULTS, **(config.eva_config or {})})
    for name, lowest, highest in (("rho", 1, float("inf")), ("tau", 0, 1)):
        value = getattr(settings, name)
        if not is_number(value) or not lowest <= value <= highest:
            expected = f"at least {lowest}" if highest > 1 else f"{lowest} to {highest}"
            raise InputError(f"peft.eva_config gives {name} {value!r}, expected {expected}")
    for name in ("use_label_mask", "whiten", "adjust_scaling_factors"):
        if not isinstance(getattr(settings, name), bool):
            raise InputError(f"peft.eva_config gives {name} {getattr(settings, name)!r}, expected true or false")
    return settings


@dataclass
class _Source:
    """A layer's input, which is that of every slice of it, too.

    Attributes:
        layer: None outside the stack.
        place: the name within the layer (`self_attn.qkv_proj`).
        inputs: how wide it is.
        ranks: what the configuration gives the modules that it feeds, by their names in a checkpoint.
        components: how many to compute.
    """

    layer: int | None
    place: str
    inputs: int
    ranks: dict[str, int] = field(default_factory=dict)
    components: int = 0

    def fresh(self) -> IncrementalPCA:
        return IncrementalPCA.empty(self.components, self.inputs)


def _sources(modules: Iterable[Module], config: LoraConfig, rho: float) -> dict[str, _Source]:
    """By names such as `3.self_attn.qkv_proj`."""
    sources: dict[str, _Source] = {}
    for module in modules:
        place = module.parent.removeprefix("model.layers.")
        for i, name in enumerate(module.names):
            layer = module.layers[i] if module.layers else None
            source = sources.setdefault(f"{layer}.{place}", _Source(layer, place, module.shape[1]))
            source.ranks[name], _ = config.rank_and_alpha(name)
            source.components = max(source.components, round(source.ranks[name] * rho))
            if source.components > source.inputs:
                raise InputError(
                    f"init_lora_weights eva needs r·rho = {source.components} components of the inputs of "
                    f"{module.suffix}, which has {source.inputs}; lower r or eva_config's rho"
                )
    return sources


def _collect(
    model: Phi3ForCausalLM,
    sources: Mapping[str, _Source],
    states: dict[str, IncrementalPCA],
    batches: Iterable[Batch],
    settings: _Settings,
    key: PRNGKeyArray,
) -> tuple[dict[str, int], dict[str, bool], int]:
    """Brings `states` up to date with batch after batch.

    Returns:
        The ranks by modules' names in a checkpoint, whether each source's components have converged, and how
        many batches were drawn.
    """
    budget = sum(rank for source in sources.values() for rank in source.ranks.values())
    ranks = {name: source.components for source in sources.values() for name in source.ranks}
    done = dict.fromkeys(sources, False)
    number, most = 0, 0
    for batch in batches:
        number += 1
        counted = _counted(batch, settings)
        most = max(most, int(jnp.sum(counted)))
        _observe(model, sources, states, done, batch, counted, settings.tau, key)
        host = jax.device_get({n: (s.explained, s.converged, s.count) for n, s in states.items()})
        if all(count > 0 for _, _, count in host.values()):
            ranks = _distributed(sources, {name: explained for name, (explained, _, _) in host.items()}, budget)
        for name, source in sources.items():
            used = max(ranks[n] for n in source.ranks)
            done[name] = bool(np.all(host[name][1][:used]))
        if all(done.values()):
            break
    if number == 0:
        raise InputError("init_lora_weights eva needs data, but there are no batches; give some")
    if not all(float(state.count) for state in states.values()):
        needed = max(source.components for source in sources.values())
        raise InputError(
            f"init_lora_weights eva needs a batch with at least r·rho = {needed} tokens that count, but the most is "
            f"{most}; give larger batches, or set eva_config's use_label_mask false"
        )
    return ranks, done, number


def _distributed(
    sources: Mapping[str, _Source], explained: Mapping[str, Float[np.ndarray, "k"]], budget: int
) -> dict[str, int]:
    """Ranks: one for each of the `budget` components that explain most of their layer's variance.

    Modules with one input have the same components, and the first of them goes first.
    """
    owners, values = [], []
    # The first of each source before all others: where values are equal, the sort leaves that order.
    members = [(i, source, name) for source, s in sources.items() for i, name in enumerate(s.ranks)]
    for i, source, name in sorted(members, key=lambda member: member[0] > 0):
        del i
        if not np.all(np.isfinite(explained[source])):
            raise InputError(f"the inputs of {name} have no finite variance; look at the data, or train in float32")
        owners += [name] * len(explained[source])
        values.append(explained[source])
    ranks = dict.fromkeys(owners, 0)
    for index in np.argsort(-np.concatenate(values), kind="stable")[:budget]:
        ranks[owners[index]] += 1
    return ranks


def _counted(batch: Batch, settings: _Settings) -> Bool[Array, "batch seq"]:
    """Which tokens count."""
    counted = documents(batch) != 0
    if jnp.ndim(batch["input_ids"]) != 2:
        raise InputError(f"a batch's input_ids have shape {jnp.shape(batch['input_ids'])}, expected [batch, seq]")
    if settings.use_label_mask and "labels" in batch:
        counted &= jnp.asarray(batch["labels"]) != settings.label_mask_value
    elif settings.use_label_mask and "loss_mask" in batch:
        counted &= jnp.asarray(batch["loss_mask"]) != 0
    return counted


def _observe(
    model: Phi3ForCausalLM,
    sources: Mapping[str, _Source],
    states: dict[str, IncrementalPCA],
    done: Mapping[str, bool],
    batch: Batch,
    counted: Bool[Array, "batch seq"],
    tau: float,
    key: PRNGKeyArray,
) -> None:
    """One pass of the model, layer by layer; updates the states of sources that are not done."""
    segments = documents(batch)
    positions = batch.get("positions")
    positions = default_positions(segments) if positions is None else jnp.asarray(positions)
    x = model.embed(jnp.asarray(batch["input_ids"]))
    cos_sin = rope_cos_sin(model.config, positions, segments, x.dtype)
    window = model.config.sliding_window

    def of_layer(layer: int | None) -> Iterator[tuple[str, str]]:
        return ((name, source.place) for name, source in sources.items() if source.layer == layer)

    for number, layer in enumerate(model.model.stack({})):
        names = {place: name for name, place in of_layer(number)}
        pcas = {place: states[name] for place, name in names.items()}
        due = {place: jnp.asarray(not done[name]) for place, name in names.items()}
        x, pcas = _layer(window, layer, x, cos_sin, segments, counted, pcas, due, tau, key)
        states.update({names[place]: pca for place, pca in pcas.items()})
    for name, _ in of_layer(None):
        inputs = model.model.norm(x)
        states[name] = _advanced(states[name], inputs, counted, jnp.asarray(not done[name]), tau, key)


@partial(jax.jit, static_argnums=0)
def _layer(
    window: int | None,
    layer: Layer,
    x: Float[Array, "batch seq hidden"],
    cos_sin: CosSin,
    segments: Int[Array, "batch seq"],
    counted: Bool[Array, "batch seq"],
    pcas: dict[str, IncrementalPCA],
    due: dict[str, Bool[Array, ""]],
    tau: float,
    key: PRNGKeyArray,
) -> tuple[Float[Array, "batch seq hidden"], dict[str, IncrementalPCA]]:
    """A layer's output, and the components of what its linear layers are given."""
    inputs: dict[str, Array] = {}

    def observer(place: str) -> Observer:
        return Observer(lambda x, *_: inputs.update({place: x}))

    adapters = nested({place: observer(place) for place in pcas})
    with precise(x.dtype):
        x, _ = replace(layer, adapters=adapters)(x, cos_sin, without_cache(segments, window))
    return x, {place: _advanced(pca, inputs[place], counted, due[place], tau, key) for place, pca in pcas.items()}


@jax.jit
def _advanced(
    pca: IncrementalPCA,
    x: Float[Array, "batch seq in"],
    counted: Bool[Array, "batch seq"],
    due: Bool[Array, ""],
    tau: float,
    key: PRNGKeyArray,
) -> IncrementalPCA:
    enough = jnp.sum(counted) >= pca.components.shape[0]
    rows = x.reshape(-1, x.shape[-1])
    updated: IncrementalPCA = jax.lax.cond(
        due & enough, lambda: pca.updated(rows, counted.ravel(), tau, key), lambda: pca
    )
    return updated


def _lora(
    model: Phi3ForCausalLM,
    config: LoraConfig,
    settings: _Settings,
    modules: Iterable[Module],
    components: Mapping[str, Float[Array, "r in"]],
    key: PRNGKeyArray,
) -> Lora:
    """Adapters with these A, by names in a checkpoint; those of rank 0 are left out."""
    targets = [module.suffix for module in config_targets(model, config) if module.is_embedding]
    ranks, alphas = {}, {}
    for module in modules:
        kept = [name for name in module.names if len(components[name])]
        targets += [module.suffix] if len(kept) == model.config.num_hidden_layers else kept
        for name in kept:
            r, alpha = config.rank_and_alpha(name)
            rank = len(components[name])
            if settings.adjust_scaling_factors and rank != r:
                alpha *= rank / r
            if rank != config.r:
                ranks[name] = rank
            if alpha != config.lora_alpha:
                alphas[name] = alpha
    config = replace(
        config,
        target_modules=tuple(targets),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )
    # All but A is as usual, where B is zero.
    lora = init_lora(model, replace(config, init_lora_weights=True, eva_config=None), key)
    items = {name: _with_components(name, adapter, components) for name, adapter in lora.items()}
    written = replace(lora.config, init_lora_weights="eva", eva_config=config.eva_config)
    return replace(lora, adapters=nested(items), config=written)


def _with_components(name: str, adapter: PyTree, components: Mapping[str, Array]) -> PyTree:
    """The adapter with its components as A; one that has none (an embedding's, token rows) as it is."""
    if name in components:
        return replace(adapter, lora_A=components[name])

    def stacked(part: PyTree, layers: Iterable[int]) -> PyTree:
        return replace(part, lora_A=jnp.stack([components[checkpoint_name(name, layer)] for layer in layers]))

    if isinstance(adapter, ByLayer):
        parts = (stacked(part, layers) for part, layers in zip(adapter.parts, adapter.layers, strict=True))
        return replace(adapter, parts=tuple(parts))
    return stacked(adapter, range(len(adapter.lora_A))) if name.startswith("model.layers.") else adapter
