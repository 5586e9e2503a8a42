"""How many parameters train, module by module."""

import math
from dataclasses import dataclass

import jax
from flax import nnx

from phi3_jax.lora.mask import partition, trainable_mask
from phi3_jax.lora.stack import STACK, parts_of
from phi3_jax.lora.targets import slices
from phi3_jax.lora.tree import Lora
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.system.dotted import dotted, last_part


@dataclass(frozen=True)
class ParameterRow:
    """A trainable module.

    Where the layers of a module differ, each kind of layer has a row of its own.

    Attributes:
        module: Its name, layer index left out.
        layers: How many layers have it, 1 outside the stack.
        shapes: Of one layer's arrays.
        count: Numbers in all layers together.
        note: What the name alone does not say.
    """

    module: str
    layers: int
    shapes: dict[str, tuple[int, ...]]
    count: int
    note: str = ""


@dataclass(frozen=True)
class ParameterTable:
    """All trainable modules.

    Attributes:
        rows: A module each.
        total: Numbers of base and adapter together, as PEFT counts them.
    """

    rows: tuple[ParameterRow, ...]
    total: int

    @property
    def trainable(self) -> int:
        """Numbers that train."""
        return sum(row.count for row in self.rows)

    @property
    def share(self) -> float:
        """Trainable of all, between 0 and 1."""
        return self.trainable / self.total


def parameter_table(model: Phi3ForCausalLM, lora: Lora | None, *, freeze_A: bool = False) -> ParameterTable:
    """The modules of an adapter; without one (full fine-tuning) those of the model.

    PiSSA's constants do not count. Abstract models and adapters (`nnx.eval_shape`,
    `jax.eval_shape`) will do.

    Args:
        model: The base.
        lora: The adapter, or None.
        freeze_A: Whether A of linear layers does not train (LoRA-FA).

    Example:
        >>> import phi3_jax as p3
        >>> sizes = dict(vocab_size=9, hidden_size=16, intermediate_size=8, num_hidden_layers=2, head_dim=8)
        >>> config = p3.Phi3Config(**sizes, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)
        >>> model = p3.Phi3ForCausalLM(config, rngs=nnx.Rngs(0))
        >>> lora = p3.init_lora(model, p3.LoraConfig(r=2, target_modules=["o_proj"]), jax.random.key(0))
        >>> table = p3.parameter_table(model, lora)
        >>> table.trainable, table.rows[0].shapes
        (128, {'lora_A': (2, 16), 'lora_B': (16, 2)})
    """
    weights = nnx.to_flat_state(nnx.state(model))
    base = sum(math.prod(weight.shape) for _, weight in weights)
    layers = model.config.num_hidden_layers
    if lora is None:
        rows = [_row(dotted(path[:-1]), {str(path[-1]): tuple(weight.shape)}, layers) for path, weight in weights]
        return ParameterTable(tuple(rows), base)
    state = nnx.state(model)
    whole, _ = partition(lora, trainable_mask(state, lora)["lora"])
    total = base + sum(leaf.size for leaf in jax.tree.leaves(whole))
    trained, _ = partition(lora, trainable_mask(state, lora, freeze_A=freeze_A)["lora"])
    notes = {part.name: f"slice of {last_part(part.parent)}" for part in slices(model)}
    rows = []
    for name, adapter in trained.items():
        in_stack = name.startswith(STACK)
        for part, _ in parts_of(adapter) if in_stack else ((adapter, ()),):
            shapes = {path[-1].name: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(part)}
            count = next(iter(shapes.values()))[0] if in_stack else 1
            rows.append(_row(name, shapes, count, notes.get(name, "")))
    rows += [_row(name, {"weight": w.shape}, layers, "as a whole") for name, w in trained.saved.items()]
    return ParameterTable(tuple(rows), total)


def _row(name: str, shapes: dict[str, tuple[int, ...]], num_layers: int, note: str = "") -> ParameterRow:
    count = sum(map(math.prod, shapes.values()))
    if name.startswith(STACK):
        return ParameterRow(name, num_layers, {key: shape[1:] for key, shape in shapes.items()}, count, note)
    return ParameterRow(name, 1, shapes, count, note)


def format_parameter_table(table: ParameterTable) -> str:
    """Lines to print: module, layers, shapes and count, and the total with its share.

    Args:
        table: See `parameter_table`.

    Example:
        >>> row = ParameterRow("model.layers.mlp.down_proj", 2, {"lora_A": (1, 8), "lora_B": (4, 1)}, 24)
        >>> print(format_parameter_table(ParameterTable((row,), total=480)))
        trainable module            layers  shapes                  parameters
        model.layers.mlp.down_proj       2  lora_A 1×8, lora_B 4×1          24
        24 of 480 parameters train (5.00%)
    """
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
