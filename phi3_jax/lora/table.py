"""How many parameters train, module by module."""

import math
from dataclasses import dataclass

import jax
from flax import nnx

from phi3_jax.lora.adapters import Lora
from phi3_jax.model import Phi3ForCausalLM


@dataclass(frozen=True)
class ParameterRow:
    """A trainable module.

    **Fields**: `module`, its name, layer index left out; `layers`, how many layers have it (1
    outside the stack); `shapes`, of one layer's arrays; `count`, numbers in all layers together.
    """

    module: str
    layers: int
    shapes: dict[str, tuple[int, ...]]
    count: int


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


def parameter_table(model: Phi3ForCausalLM, lora: Lora | None) -> ParameterTable:
    """The modules of an adapter; without one (full fine-tuning) those of the model.

    Abstract models and adapters (`nnx.eval_shape`, `jax.eval_shape`) will do.
    """
    weights = nnx.to_flat_state(nnx.state(model))
    base = sum(math.prod(weight.shape) for _, weight in weights)
    layers = model.config.num_hidden_layers
    if lora is None:
        rows = [
            _row(".".join(map(str, path[:-1])), {str(path[-1]): tuple(weight.shape)}, layers)
            for path, weight in weights
        ]
        return ParameterTable(tuple(rows), base)
    rows = [
        _row(name, {path[0].name: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(adapter)}, layers)
        for name, adapter in lora.items()
    ]
    return ParameterTable(tuple(rows), base + sum(row.count for row in rows))


def _row(name: str, shapes: dict[str, tuple[int, ...]], num_layers: int) -> ParameterRow:
    count = sum(map(math.prod, shapes.values()))
    if name.startswith("model.layers."):
        return ParameterRow(name, num_layers, {key: shape[1:] for key, shape in shapes.items()}, count)
    return ParameterRow(name, 1, shapes, count)


def format_parameter_table(table: ParameterTable) -> str:
    """Lines to print: module, layers, shapes and count, and the total with its share."""
    cells = [("trainable module", "layers", "shapes", "parameters")]
    for row in table.rows:
        shapes = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in row.shapes.items())
        cells.append((row.module, str(row.layers), shapes, f"{row.count:,}"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        f"{name:<{widths[0]}}  {layers:>{widths[1]}}  {shapes:<{widths[2]}}  {count:>{widths[3]}}"
        for name, layers, shapes, count in cells
    ]
    lines.append(f"{table.trainable:,} of {table.total:,} parameters train ({table.share:.2%})")
    return "\n".join(lines)
