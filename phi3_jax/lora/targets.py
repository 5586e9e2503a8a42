"""Which modules of a model an adapter is for, by PEFT's rules, without PEFT's silences."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flax import nnx

from phi3_jax.errors import InputError
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.layers import Embedding, Linear

ALL_LINEAR = "all-linear"

# What Llama-like models call the parts of a projection that Phi-3 keeps in one.
FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


@dataclass(frozen=True)
class Module:
    """A layer that can have an adapter.

    **Fields**
    - `name`: as in the model's pytree, the layer index left out: `model.layers.mlp.down_proj`.
    - `names`: as in a checkpoint: `model.layers.0.mlp.down_proj` and so on; `name` alone outside
      the layers.
    - `shape`: of one layer's weight: `[out, in]`, of the embedding `[vocab, hidden]`.
    - `is_embedding`: a table that is looked up, no matrix product.
    """

    name: str
    names: tuple[str, ...]
    shape: tuple[int, int]
    is_embedding: bool

    @property
    def stack(self) -> tuple[int, ...]:
        """`(L,)` for a module of the decoder layers, `()` for the others."""
        return (len(self.names),) if self.names != (self.name,) else ()

    @property
    def suffix(self) -> str:
        """The last part of the name, which no other module has."""
        return self.name.rpartition(".")[2]


def adaptable_modules(model: Phi3ForCausalLM) -> list[Module]:
    """Every linear layer and embedding of a model, sorted by name, the output head last.

    Works on abstract models (`nnx.eval_shape`) too. With tied embeddings there is an `lm_head`
    nevertheless, whose weight is the embedding's, as transformers and PEFT have it.
    """
    vocab_hidden = model.config.vocab_size, model.config.hidden_size
    modules = [
        Module(name, names, _weight_shape(module), isinstance(module, Embedding))
        for name, names, module in _walk(model)
        if isinstance(module, Linear | Embedding) and name != "lm_head"
    ]
    # An abstract model lists its modules in another order than a concrete one.
    modules.sort(key=lambda module: module.name)
    return [*modules, Module("lm_head", ("lm_head",), vocab_hidden, False)]


def checkpoint_names(name: str, num_layers: int) -> tuple[str, ...]:
    """What checkpoints call a module of the pytree: one name a layer if it is in the stack.

    `model.layers.mlp` is `model.layers.0.mlp`, `model.layers.1.mlp` and so on.
    """
    if not (name + ".").startswith("model.layers."):
        return (name,)
    tail = name.removeprefix("model.layers")
    return tuple(f"model.layers.{i}{tail}" for i in range(num_layers))


def match_targets(model: Phi3ForCausalLM, target_modules: str | Sequence[str]) -> list[Module]:
    """The modules that `target_modules` names, in the model's order.

    **Arguments**
    - `target_modules`: names, each of which stands for the modules of exactly that name and those
      that end in `.name`; or one string: a regular expression for the whole of a name, or
      `"all-linear"` (every linear layer but the output head).

    Raises `InputError` where a name, or the expression, matches nothing, matches something that
    can have no adapter (as PEFT does), or matches some of a stack's layers and not the others.
    """
    modules = adaptable_modules(model)
    if isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR:
        return [m for m in modules if not m.is_embedding and m.name != "lm_head"]
    everything = [name for _, names, _ in _walk(model) for name in names]
    if model.lm_head is None:
        everything.append("lm_head")
    if isinstance(target_modules, str):
        matched = _match_pattern(target_modules, everything, modules)
    else:
        matched = _match_names(target_modules, everything, modules)

    wrong = matched.difference(*(m.names for m in modules))
    if wrong:
        raise InputError(
            f"target_modules {_show(target_modules)} matches {min(wrong)}, which is neither a linear layer nor an "
            f"embedding; {_choices(modules)}"
        )
    for module in modules:
        missing = [name for name in module.names if name not in matched]
        if missing and len(missing) < len(module.names):
            raise InputError(
                f"target_modules {_show(target_modules)} matches {len(module.names) - len(missing)} of the "
                f"{len(module.names)} layers of {module.suffix}, which is not supported yet; name all or none"
            )
    return [m for m in modules if m.names[0] in matched]


def _match_pattern(pattern: str, everything: Sequence[str], modules: Sequence[Module]) -> set[str]:
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise InputError(f"target_modules {pattern!r} is no regular expression ({error}); correct it") from error
    matched = {name for name in everything if regex.fullmatch(name)}
    if matched:
        return matched
    hint = ""
    if any(_is_named(name, pattern) for name in everything):
        hint = f" (a single name goes into a list: [{pattern}])"
    raise InputError(
        f"target_modules {pattern!r} matches nothing: a string is a regular expression for a whole name such as "
        f"{modules[1].names[0]}{hint}; {_choices(modules)}"
    )


def _match_names(targets: Sequence[str], everything: Sequence[str], modules: Sequence[Module]) -> set[str]:
    matched = {target: {name for name in everything if _is_named(name, target)} for target in targets}
    unmatched = [target for target, names in matched.items() if not names]
    if not unmatched:
        return set().union(*matched.values())
    fused = {target: FUSED[target.rpartition(".")[2]] for target in unmatched if target.rpartition(".")[2] in FUSED}
    message = (
        f"target_modules {_show(targets)}: {', '.join(unmatched)} {_plural(unmatched, 'matches', 'match')} nothing"
    )
    if fused:
        parts = ", ".join(f"{old} into {new}" for old, new in fused.items())
        message += f" (Phi-3 fuses {parts})"
    if ALL_LINEAR in unmatched:
        message += f" ({ALL_LINEAR} is given as a string, not in a list)"
    raise InputError(f"{message}; {_choices(modules)}")


def _is_named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _choices(modules: Sequence[Module]) -> str:
    return f"choose from {', '.join(m.suffix for m in modules)} or give '{ALL_LINEAR}'"


def _show(target_modules: str | Sequence[str]) -> str:
    return repr(target_modules) if isinstance(target_modules, str) else f"[{', '.join(target_modules)}]"


def _plural(things: Sequence[str], one: str, many: str) -> str:
    return one if len(things) == 1 else many


def _walk(model: Phi3ForCausalLM) -> Iterator[tuple[str, tuple[str, ...], nnx.Module]]:
    """(name in the pytree, names in a checkpoint, module) of every module below `model`."""

    def children(module: nnx.Module, parent: str) -> Iterator[tuple[str, tuple[str, ...], nnx.Module]]:
        for attribute, child in vars(module).items():
            if isinstance(child, nnx.Module):
                name = f"{parent}{attribute}"
                yield name, checkpoint_names(name, model.config.num_hidden_layers), child
                yield from children(child, f"{name}.")

    return children(model, "")


def _weight_shape(module: Linear | Embedding) -> tuple[int, int]:
    rows, columns = module.weight.shape[-2:]
    return rows, columns
