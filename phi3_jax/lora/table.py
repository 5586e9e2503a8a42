"""How many parameters train, module by module."""

import math
from dataclasses import dataclass

import jax
from flax import nnx

from phi3_jax.lora.mask import partition, trainable_mask
from phi3_jax.lora.targets import slices
from phi3_jax.lora.tree import ByLayer, Lora
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.system.dotted import dotted, last_part


@dataclass(frozen=True)
class ParameterRow:
    """A trainable module.

    **Fields**: `module`, its name, layer index left out; `layers`, how many layers have it (1
    outside the stack); `shapes`, of one layer's arrays; `count`, numbers in all layers together;
    `note`, what the name alone does not say. Where the layers of a module differ, each kind of
    layer has a row of its own.
    """

    module: str
    layers: int
    shapes: dict[str, tuple[int, ...]]
    count: int
    note: str = ""


@dataclass(frozen=True)
class ParameterTable:
    """All trainable modules. `total` counts base and adapter together, as PEFT does."""

    rows: tuple[ParameterRow, ...]
    total: int

    @property
    def trainable(self) -> int:
        return sum(row.count for row in self.rows)

    @property
    def share(self) -> float:
        """Trainable of all, between 0 and 1."""
        return self.trainable / self.total


def parameter_table(model: Phi3ForCausalLM, lora: Lora | None, *, freeze_A: bool = False) -> ParameterTable:
    """The modules of an adapter; without one (full fine-tuning) those of the model.

    PiSSA's constant start does not count. Abstract models and adapters (`nnx.eval_shape`,
    `jax.eval_shape`) will do.

    **Arguments**: `freeze_A`, that A of linear layers does not train (LoRA-FA).
    """
    weights = nnx.to_flat_state(nnx.state(model))
    base = sum(math.prod(weight.shape) for _, weight in weights)
    layers = model.config.num_hidden_layers
    if lora is None:
        rows = [_row(dotted(path[:-1]), {str(path[-1]): tuple(weight.shape)}, layers) for path, weight in weights]
        return ParameterTable(tuple(rows), base)
    state = nnx.state(model)
    adapter, _ = partition(lora, trainable_mask(state, lora)["lora"])
    total = base + sum(leaf.size for leaf in jax.tree.leaves(adapter))
    lora, _ = partition(lora, trainable_mask(state, lora, freeze_A=freeze_A)["lora"])
    notes = {part.name: f"slice of {last_part(part.parent)}" for part in slices(model)}
    rows = []
    for name, adapter in lora.items():
        for part in adapter.parts if isinstance(adapter, ByLayer) else (adapter,):
            shapes = {path[-1].name: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(part)}
            count = next(iter(shapes.values()))[0] if name.startswith("model.layers.") else 1
            rows.append(_row(name, shapes, count, notes.get(name, "")))
    rows += [_row(name, {"weight": w.shape}, layers, "as a whole") for name, w in lora.saved.items()]
    return ParameterTable(tuple(rows), total)


def _row(name: str, shapes: dict[str, tuple[int, ...]], num_layers: int, note: str = "") -> ParameterRow:
    count = sum(map(math.prod, shapes.values()))
    if name.startswith("model.layers."):
        return ParameterRow(name, num_layers, {key: shape[1:] for key, shape in shapes.items()}, count, note)
    return ParameterRow(name, 1, shapes, count, note)


def format_parameter_table(table: ParameterTable) -> str:
    """Lines to print: module, layers, shapes and count, and the total with its share."""
    cells = [("trainable module", "layers", "shapes", "parameters")]
    for row in table.rows:
        shapes = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in row.shapes.items())
        module = f"{row.module} ({row.note})" if row.note else row.module
        cells.append((module, str(row.layers), shapes, f"{row.count:,}"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        f"{name:<{widths[0]}}  {layers:>{widths[1]}}  {shapes:<{widths[2]}}  {count:>{widths[3]}}"
        for name, layers, shapes, count in cells
    ]
    lines.append(f"{table.trainable:,} of {table.total:,} parameters train ({table.share:.2%})")
    return "\n".join(lines)
