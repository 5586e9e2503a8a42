"""Which modules of a model an adapter is for, by PEFT's rules, without PEFT's silences."""

import logging
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from flax import nnx

from phi3_jax.config.lora import LoraConfig, matching_key
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.layers import Embedding, FusedLinear, Linear
from phi3_jax.system.dotted import dotted, last_part, sibling
from phi3_jax.system.errors import InputError
from phi3_jax.system.expressions import matches

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
# Ranks up to here stand in scripts, whatever the model.
_ANY_MODELS_RANK = 256

Names = str | Sequence[str]


@dataclass(frozen=True)
class Module:
    """A layer, or a slice of a fused one, that can have an adapter.

    Attributes:
        name: As in the model's pytree, the layer index left out: `model.layers.mlp.down_proj`; a slice takes
            the place of its layer's name: `model.layers.self_attn.q_proj`.
        names: As in a checkpoint: `model.layers.0.mlp.down_proj` and so on; `name` alone outside the layers.
        layers: The indices that these names belong to; none outside the layers.
        shape: Of one layer's weight (or the slice's rows of it): `[out, in]`, of the embedding
            `[vocab, hidden]`.
        is_embedding: Whether it is a table that is looked up, no matrix product.
        parent: The module whose weight it is; for a slice the fused one.
        rows: Which rows of that weight.
    """

    name: str
    names: tuple[str, ...]
    layers: tuple[int, ...]
    shape: tuple[int, int]
    is_embedding: bool
    parent: str
    rows: slice

    @property
    def stack(self) -> tuple[int, ...]:
        """`(L,)` for a module of the decoder layers, `()` for the others."""
        return (len(self.layers),) if self.layers else ()

    @property
    def suffix(self) -> str:
        """The last part of the name, which no other module has."""
        return last_part(self.name)

    @property
    def is_slice(self) -> bool:
        return self.name != self.parent

    def narrowed(self, names: Container[str]) -> "Module | None":
        """The same in those layers whose `names` are given; None if there are none."""
        kept = [i for i, name in enumerate(self.names) if name in names]
        layers = tuple(self.layers[i] for i in kept) if self.layers else ()
        return replace(self, names=tuple(self.names[i] for i in kept), layers=layers) if kept else None


def adaptable_modules(model: Phi3ForCausalLM) -> list[Module]:
    """Every linear layer and embedding of a model, sorted by name, the output head last.

    Works on abstract models (`nnx.eval_shape`) too. With tied embeddings there is an `lm_head`
    nevertheless, whose weight is the embedding's, as transformers and PEFT have it.
    """
    modules = [
        _module(name, names, module, model.config.num_hidden_layers)
        for name, names, module in _walk(model)
        if isinstance(module, Linear | Embedding) and name != "lm_head"
    ]
    # An abstract model lists its modules in another order than a concrete one.
    modules.sort(key=lambda module: module.name)
    shape = model.config.vocab_size, model.config.hidden_size
    return [*modules, Module("lm_head", ("lm_head",), (), shape, False, "lm_head", slice(0, shape[0]))]


def slices(model: Phi3ForCausalLM) -> list[Module]:
    """The parts of fused layers under the names that they have in Llama-like models, in their order."""
    found = []
    for name, names, module in _walk(model):
        if isinstance(module, FusedLinear):
            whole = _module(name, names, module, model.config.num_hidden_layers)
            for part, rows in module.rows.items():
                shape = rows.stop - rows.start, whole.shape[1]
                own = tuple(sibling(n, part) for n in names)
                found.append(replace(whole, name=sibling(name, part), names=own, shape=shape, rows=rows))
    return sorted(found, key=lambda module: (module.parent, module.rows.start))


def _module(name: str, names: tuple[str, ...], module: Linear | Embedding, num_layers: int) -> Module:
    rows, columns = module.weight.shape[-2:]
    layers = tuple(range(num_layers)) if names != (name,) else ()
    return Module(name, names, layers, (rows, columns), isinstance(module, Embedding), name, slice(0, rows))


def checkpoint_names(name: str, num_layers: int) -> tuple[str, ...]:
    """What checkpoints call a module of the pytree: one name a layer if it is in the stack.

    `model.layers.mlp` is `model.layers.0.mlp`, `model.layers.1.mlp` and so on.
    """
    if not (name + ".").startswith("model.layers."):
        return (name,)
    return tuple(checkpoint_name(name, layer) for layer in range(num_layers))


def checkpoint_name(name: str, layer: int) -> str:
    """What checkpoints call a stacked module in one layer."""
    return f"model.layers.{layer}{name.removeprefix('model.layers')}"


def config_targets(model: Phi3ForCausalLM, config: LoraConfig) -> list[Module]:
    """The modules, and the layers of each, that get adapters by a configuration.

    Args:
        model: An abstract one (`nnx.eval_shape`) will do.
        config: Its targets, what it leaves out, and its patterns.

    Raises:
        InputError: For whatever in it matches nothing, or cannot be together.
    """
    modules = match_targets(model, config.target_modules)
    if config.exclude_modules:
        modules = _without(modules, config.exclude_modules)
    if config.modules_to_save:
        modules = _without_saved(modules, set(saved_modules(model, config.modules_to_save)))
    if config.layers_to_transform is not None:
        modules = _in_layers(modules, config, model.config.num_hidden_layers)
    if not modules:
        raise InputError(
            f"target_modules {_show(config.target_modules)}: nothing is left of it after exclude_modules, "
            "modules_to_save and layers_to_transform"
        )
    _check_overlap(modules)
    if config.ensure_weight_tying:
        _check_untied(model, modules, config)
    if config.use_dora:
        _check_whole_slices(model, modules)
    for field in ("rank_pattern", "alpha_pattern"):
        used = {matching_key(getattr(config, field), name) for module in modules for name in module.names}
        for key in getattr(config, field) or {}:
            if key not in used:
                raise InputError(
                    f"{field}: {key!r} matches none of the modules with adapters that no earlier key matches; "
                    f"there are {', '.join(module.suffix for module in modules)}"
                )
    _check_ranks(modules, config)
    return modules


def tied_ends(model: Phi3ForCausalLM, modules: Iterable[Module], modules_to_save: Sequence[str] | None) -> list[str]:
    """Which of embedding and output head train where these share a table; none where they do not.

    Args:
        model: An abstract one will do.
        modules: Those with adapters.
        modules_to_save: What trains as a whole.
    """
    if model.lm_head is not None:
        return []
    names = {module.name for module in modules}.union(saved_modules(model, modules_to_save or ()))
    return sorted(names & {"model.embed_tokens", "lm_head"})


def _check_untied(model: Phi3ForCausalLM, modules: Iterable[Module], config: LoraConfig) -> None:
    """Raises `InputError` where embedding and output head would have to share what they train."""
    if ends := tied_ends(model, modules, config.modules_to_save):
        raise InputError(
            f"ensure_weight_tying is true, and {' and '.join(map(last_part, ends))} of this model, whose embedding and "
            "output head share a table, would train: one adapter for both is not supported; leave it out to train "
            "them apart, as PEFT does without it, or train neither"
        )


def _check_ranks(modules: Iterable[Module], config: LoraConfig) -> None:
    """Refuses a rank above both sides of a module's matrix, which is a slip; names one that is above the lesser.

    An update has no more directions than the lesser side. A rank between the two costs memory and does no harm, and
    PEFT takes it, as it takes the ranks of any script for a model as tiny as those of tests.
    """
    idle: dict[int, str] = {}
    for module in modules:
        for name in module.names:
            r = config.rank_and_alpha(name)[0]
            shape = f"{name} ({module.shape[0]}×{module.shape[1]})"
            if r > max(*module.shape, _ANY_MODELS_RANK):
                raise InputError(
                    f"peft.r is {r:,} for {shape}, which has updates of rank {min(module.shape):,} at most; give a "
                    "lower r, or a lower one for it in rank_pattern"
                )
            if r > min(module.shape):
                idle.setdefault(r, shape)
    for r, shape in idle.items():
        logger.warning("peft.r is %d for %s, which has updates of a lower rank at most", r, shape)


def match_targets(model: Phi3ForCausalLM, target_modules: Names) -> list[Module]:
    """The modules that `target_modules` names, in the model's order, slices of fused ones last.

    Args:
        model: An abstract one (`nnx.eval_shape`) will do.
        target_modules: Names, each of which stands for the modules of exactly that name and those that end in
            `.name`; or one string: a regular expression for the whole of a name, or `"all-linear"` (every
            linear layer but the output head).

    Raises:
        InputError: Where a name, or the expression, matches nothing, or something that can have no adapter (as
            PEFT does).
    """
    modules = adaptable_modules(model)
    if isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR:
        return [m for m in modules if not m.is_embedding and m.name != "lm_head"]
    modules += slices(model)
    everything = [name for _, names, _ in _walk(model) for name in names]
    everything += [name for module in modules for name in module.names if name not in everything]
    matched, unmatched = _matched("target_modules", target_modules, everything)
    if unmatched:
        raise InputError(f"{_nothing_matches(target_modules, unmatched, everything, modules)}; {_choices(modules)}")
    if isinstance(target_modules, str):
        # `.*_proj` fits a fused layer and its slices; PEFT's meaning, the layer, goes first.
        for part in filter(lambda module: module.is_slice, modules):
            whole = [checkpoint_name(part.parent, layer) for layer in part.layers]
            matched -= {name for name, parent in zip(part.names, whole, strict=True) if parent in matched}
    wrong = matched.difference(*(m.names for m in modules))
    if wrong:
        raise InputError(
            f"target_modules {_show(target_modules)} matches {min(wrong)}, which is neither a linear layer nor an "
            f"embedding; {_choices(modules)}"
        )
    return _narrowed(modules, matched)


def _matched(field: str, wanted: Names, names: Sequence[str]) -> tuple[set[str], list[str]]:
    """Those of the names that a list of names or an expression is for, and what of it is for none of them."""
    if isinstance(wanted, str):
        found = {wanted: {name for name in names if matches(field, wanted, name)}}
    else:
        found = {target: {name for name in names if _is_named(name, target)} for target in wanted}
    return set().union(*found.values()), [target for target, hits in found.items() if not hits]


def _nothing_matches(
    target_modules: Names, unmatched: Sequence[str], everything: Sequence[str], modules: Sequence[Module]
) -> str:
    if isinstance(target_modules, str):
        is_name = any(_is_named(name, target_modules) for name in everything)
        hint = f" (a single name goes into a list: [{target_modules}])" if is_name else ""
        return (
            f"target_modules {target_modules!r} matches nothing: a string is a regular expression for a whole name "
            f"such as {modules[1].names[0]}{hint}"
        )
    verb = "matches" if len(unmatched) == 1 else "match"
    hint = f" ({ALL_LINEAR} is given as a string, not in a list)" if ALL_LINEAR in unmatched else ""
    return f"target_modules {_show(target_modules)}: {', '.join(unmatched)} {verb} nothing{hint}"


def _narrowed(modules: Iterable[Module], names: Container[str]) -> list[Module]:
    """The modules in those layers whose names are given."""
    return [kept for module in modules if (kept := module.narrowed(names)) is not None]


def _without(modules: Sequence[Module], exclude: Names) -> list[Module]:
    names = [name for module in modules for name in module.names]
    excluded, idle = _matched("exclude_modules", exclude, names)
    if idle:
        raise InputError(
            f"exclude_modules: {', '.join(idle)} excludes none of the target modules; "
            f"there are {', '.join(module.suffix for module in modules)}"
        )
    return _narrowed(modules, set(names) - excluded)


def _without_saved(modules: Sequence[Module], saved: set[str]) -> list[Module]:
    # As in PEFT: what trains as a whole has no adapter besides.
    return [module for module in modules if module.parent not in saved]


def _in_layers(modules: Sequence[Module], config: LoraConfig, num_layers: int) -> list[Module]:
    wanted = config.layers_to_transform
    indices = (wanted,) if isinstance(wanted, int) else tuple(wanted or ())
    beyond = [index for index in indices if index >= num_layers]
    if beyond:
        raise InputError(
            f"layers_to_transform has {beyond[0]}, but the model has {num_layers} layers, 0 to {num_layers - 1}"
        )
    outside = [module.suffix for module in modules if not module.layers]
    if outside:
        raise InputError(
            f"layers_to_transform is given, but {', '.join(outside)} of target_modules is in no layer; leave one out"
        )
    pairs = [pair for m in modules for pair in zip(m.names, m.layers, strict=True)]
    return _narrowed(modules, {name for name, layer in pairs if layer in indices})


def _check_overlap(modules: Sequence[Module]) -> None:
    whole = {(module.name, layer): module for module in modules for layer in module.layers if not module.is_slice}
    for module in modules:
        if module.is_slice and any((module.parent, layer) in whole for layer in module.layers):
            fused = last_part(module.parent)
            raise InputError(f"target_modules names both {fused} and {module.suffix}, a slice of it; leave one out")


def _check_whole_slices(model: Phi3ForCausalLM, modules: Sequence[Module]) -> None:
    # PEFT's DoRA has a magnitude for every row of a layer, and for the fused layer knows no rows without.
    for part in slices(model):
        present = {module.name: module.layers for module in modules if module.parent == part.parent}
        if present and part.parent not in present and len({present.get(p.name) for p in _siblings(model, part)}) > 1:
            names = ", ".join(p.suffix for p in _siblings(model, part))
            raise InputError(
                f"use_dora with slices needs all of {names}, in the same layers, since PEFT's DoRA has a magnitude "
                f"for every row of {last_part(part.parent)}; name them all, or none"
            )


def _siblings(model: Phi3ForCausalLM, part: Module) -> list[Module]:
    return [other for other in slices(model) if other.parent == part.parent]


def saved_modules(model: Phi3ForCausalLM, modules_to_save: Sequence[str]) -> list[str]:
    """The modules with weights that `modules_to_save` names: as in PEFT, all whose name ends so, and
    what they contain. With tied embeddings `lm_head` is among the choices.

    Raises:
        InputError: Where a name matches nothing, or only some layers of a stack.
    """
    weights = {name: names for name, names, module in _walk(model) if hasattr(module, "weight")}
    weights.setdefault("lm_head", ("lm_head",))
    containers = [(name, names) for name, names, _ in _walk(model)] + [("lm_head", ("lm_head",))]
    found: dict[str, None] = {}
    for wanted in modules_to_save:
        matched = {n for _, names in containers for n in names if n.endswith(wanted)}
        if not matched:
            raise InputError(
                f"modules_to_save: {wanted} matches nothing; choose from "
                f"{', '.join(sorted({last_part(name) for name in weights}))}"
            )
        for name, names in weights.items():
            inside = [n for n in names if any(n == m or n.startswith(f"{m}.") for m in matched)]
            if len(inside) == len(names):
                found[name] = None
            elif inside:
                raise InputError(
                    f"modules_to_save: {wanted} matches {len(inside)} of the {len(names)} layers of {name}, which is "
                    "not supported; name the module in all layers"
                )
    return sorted(found)


def _is_named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _choices(modules: Sequence[Module]) -> str:
    return f"choose from {', '.join(m.suffix for m in modules)} or give '{ALL_LINEAR}'"


def _show(target_modules: Names) -> str:
    return repr(target_modules) if isinstance(target_modules, str) else f"[{', '.join(target_modules)}]"


def _walk(model: Phi3ForCausalLM) -> Iterator[tuple[str, tuple[str, ...], nnx.Module]]:
    """(name in the pytree, names in a checkpoint, module) of every module below `model`."""
    for path, module in nnx.iter_modules(model):
        if path:
            yield dotted(path), checkpoint_names(dotted(path), model.config.num_hidden_layers), module
