"""Checkpoints that bitsandbytes quantised: their `quantization_config`, and the tensors of a weight.

A 4-bit weight is `….weight` (uint8, two codes a byte) with `.absmax`, `.quant_map` (the 16 levels),
with double quantisation `.nested_absmax` and `.nested_quant_map`, and the rest as JSON in
`.quant_state.bitsandbytes__nf4`. An 8-bit weight is `….weight` (int8) with `….SCB`, its rows' absmax.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from phi3_jax.config.model import Phi3Config
from phi3_jax.hf.finite import read_finite
from phi3_jax.hf.layout import Expected, LayoutEntry, checkpoint_layout
from phi3_jax.hf.safetensors_io import FLOATS, ITEM_SIZES, READABLE, TensorEntry, TensorSource, read_tensor
from phi3_jax.model.leaves import LeafPath
from phi3_jax.parallel.distributed import to_host
from phi3_jax.quant import FP4Weight, Int8Weight, NF4Weight, Quantized
from phi3_jax.quant.base import Arrays, QuantType
from phi3_jax.quant.blocks import BLOCK_SIZE, NESTED_BLOCK_SIZE
from phi3_jax.quant.build import LeafValue
from phi3_jax.quant.dynamic import dynamic_map
from phi3_jax.quant.nf4 import from_flat, neighbours
from phi3_jax.quant.quantize import is_quantizable, layer_name
from phi3_jax.system.errors import InputError
from phi3_jax.system.reading import parse_json

MAX_STATE = 2**16  # bytes of JSON
STATE = ".quant_state.bitsandbytes__"
FLOATS_BY_NAME = {dtype.name: dtype for dtype in FLOATS.values()}
STORAGES = {"uint8": "U8", "int8": "I8", "float16": "F16", "bfloat16": "BF16", "float32": "F32"}
FOUR_BIT: dict[str, type[NF4Weight]] = {"nf4": NF4Weight, "fp4": FP4Weight}


@dataclass(frozen=True)
class BnbConfig:
    """What `quantization_config` says.

    Attributes:
        kind: Of the codes.
        double_quant: The statistics are quantised too.
        paths: The leaves of the model's state that are quantised, in all layers.
        mixed: The tensors that are quantised in leaves of which other layers are not (Unsloth's dynamic quants); such
            leaves are made dense.
        storage: The type in which the file shows packed bytes, by safetensors' name.
    """

    kind: QuantType
    double_quant: bool
    paths: frozenset[LeafPath]
    mixed: frozenset[str] = frozenset()
    storage: str = "U8"

    def stores(self, entry: LayoutEntry) -> bool:
        """Whether a weight is quantised in the file."""
        return entry.path in self.paths or entry.name in self.mixed

    def __str__(self) -> str:
        return f"{self.kind}{' with double quantisation' if self.double_quant else ''}"


def read_bnb_config(config: Phi3Config, where: Path) -> BnbConfig | None:
    """What config.json, at `where`, says of quantisation; None for an unquantised checkpoint.

    Raises:
        InputError: For other methods than bitsandbytes', and for settings of it that change the file's tensors in
            ways that are not read here.
    """
    raw = json.loads(config.source).get("quantization_config")
    if raw is None:
        return None
    method = raw.get("quant_method", "bitsandbytes") if isinstance(raw, dict) else raw
    if method != "bitsandbytes":
        raise InputError(
            f"{where}: its weights are quantised by {method!r}, expected 'bitsandbytes' or none; give the float16, "
            "bfloat16 or float32 checkpoint"
        )
    four, eight = bool(raw.get("load_in_4bit")), bool(raw.get("load_in_8bit"))
    kinds: dict[str, QuantType] = {"nf4": "nf4", "fp4": "fp4"}
    kind: QuantType | None = "int8" if eight else kinds.get(str(raw.get("bnb_4bit_quant_type", "fp4")))
    if four == eight or kind is None:
        raise InputError(
            f"{where}: quantization_config has load_in_4bit {four}, load_in_8bit {eight} and bnb_4bit_quant_type "
            f"{raw.get('bnb_4bit_quant_type')!r}, expected one of the two, and nf4 or fp4"
        )
    storage = str(raw.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch.") if four else "uint8"
    if storage not in STORAGES:
        raise InputError(
            f"{where}: bnb_4bit_quant_storage is {storage!r}, expected one of {', '.join(STORAGES)}; save it so again"
        )
    if raw.get("llm_int8_has_fp16_weight"):
        raise InputError(f"{where}: llm_int8_has_fp16_weight is true, so that nothing is quantised; remove the section")
    paths, mixed = _quantized_paths(config, raw.get("llm_int8_skip_modules"), where)
    return BnbConfig(kind, four and bool(raw.get("bnb_4bit_use_double_quant")), paths, mixed, STORAGES[storage])


def _quantized_paths(config: Phi3Config, skipped: object, where: Path) -> tuple[frozenset[LeafPath], frozenset[str]]:
    """The leaves, and the tensors of mixed ones, that `llm_int8_skip_modules` leaves, by transformers' rule: names
    from the start, up to a dot, or from the end. Without it the output head alone is left out."""
    names = ["lm_head"] if skipped is None else skipped
    if not isinstance(names, list) or not all(isinstance(n, str) and re.fullmatch(r"[\w.-]+", n) for n in names):
        raise InputError(f"{where}: llm_int8_skip_modules is {skipped!r}, expected a list of plain module names")

    def is_skipped(name: str) -> bool:
        return any(name.endswith(key) or (name + ".").startswith(key.removesuffix(".") + ".") for key in names)

    if not config.tie_word_embeddings and not is_skipped("lm_head"):
        raise InputError(f"{where}: lm_head is quantised, which is not supported; add it to llm_int8_skip_modules")
    answers: dict[LeafPath, dict[str, bool]] = {}
    for entry in checkpoint_layout(config):
        if entry.layer is not None and is_quantizable(entry.path, (0, *entry.shape)):
            found = not is_skipped(layer_name(entry.path, entry.layer))
            answers.setdefault(entry.path, {})[entry.name] = found
    paths = frozenset(path for path, found in answers.items() if all(found.values()))
    some = {path: names for path, found in answers.items() if (names := [n for n, on in found.items() if on])}
    mixed = frozenset(name for path, names in some.items() if path not in paths for name in names)
    return paths, mixed


def expected_tensors(entry: LayoutEntry, config: BnbConfig) -> dict[str, Expected]:
    """The tensors that a quantised weight is stored as."""
    if config.kind == "int8":
        module = entry.name.removesuffix(".weight")
        return {
            entry.name: Expected(entry.shape, ("I8",)),
            f"{module}.SCB": Expected(entry.shape[:1], ("F32",)),
            f"{module}.weight_format": Expected((), ("U8",), optional=True),
        }
    size = math.prod(entry.shape)
    blocks = -(-size // BLOCK_SIZE)
    tensors = {
        entry.name: Expected((-(-size // (2 * ITEM_SIZES[config.storage])), 1), (config.storage,)),
        f"{entry.name}.absmax": Expected((blocks,), ("U8" if config.double_quant else "F32",)),
        f"{entry.name}.quant_map": Expected((16,), ("F32",)),
        f"{entry.name}{STATE}{config.kind}": Expected(None, ("U8",)),
    }
    if config.double_quant:
        tensors[f"{entry.name}.nested_absmax"] = Expected((-(-blocks // NESTED_BLOCK_SIZE),), ("F32",))
        tensors[f"{entry.name}.nested_quant_map"] = Expected((256,), ("F32",))
    return tensors


def read_weight(tensors: Mapping[str, TensorEntry], entry: LayoutEntry, config: BnbConfig) -> Quantized:
    """One layer's quantised weight, in numpy arrays.

    Raises:
        InputError: Where its statistics are not those of bitsandbytes' tables and block sizes.
    """
    if config.kind == "int8":
        return _read_int8(tensors, entry)
    dtype, mean = _read_state(tensors[f"{entry.name}{STATE}{config.kind}"], entry, config)
    kind = FOUR_BIT[config.kind]
    _check_table(tensors[f"{entry.name}.quant_map"], kind.levels)
    nested = offset = None
    if config.double_quant:
        _check_table(tensors[f"{entry.name}.nested_quant_map"], dynamic_map(signed=True))
        nested = _read_finite(tensors[f"{entry.name}.nested_absmax"])
        offset = np.asarray(mean, np.float32)
    absmax = tensors[f"{entry.name}.absmax"]
    return from_flat(
        kind,
        _read(tensors[entry.name]).reshape(-1).view(np.uint8),
        _read(absmax) if config.double_quant else _read_finite(absmax),
        nested,
        offset,
        shape=entry.shape,
        dtype=dtype,
    )


def _read_int8(tensors: Mapping[str, TensorEntry], entry: LayoutEntry) -> Int8Weight:
    module = entry.name.removesuffix(".weight")
    layout = tensors.get(f"{module}.weight_format")
    if layout is not None and _read(layout) != 0:
        raise InputError(f"{layout.path}: {layout.name} is {_read(layout)}, expected 0 (rows); save the model again")
    return Int8Weight(_read(tensors[entry.name]), _read_finite(tensors[f"{module}.SCB"]))


def _read_state(tensor: TensorEntry, entry: LayoutEntry, config: BnbConfig) -> tuple[np.dtype, float]:
    """The type of the weight it stands for, and what its absmax are counted from, 0 without double quantisation."""
    wanted: dict[str, object] = {"quant_type": config.kind, "blocksize": BLOCK_SIZE, "shape": list(entry.shape)}
    if config.double_quant:
        wanted |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32"}
    if math.prod(tensor.shape) > MAX_STATE:
        raise InputError(f"{tensor.path}: {tensor.name} has {tensor.shape[0]} bytes, expected {MAX_STATE} at most")
    try:
        state = parse_json(_read(tensor).tobytes().decode("utf-8"))
        dtype, offset = FLOATS_BY_NAME.get(state.get("dtype")), 0.0
        right = {name: state.get(name) for name in wanted} == wanted and dtype is not None
        if config.double_quant:
            offset = state.get("nested_offset")
            right = right and math.isfinite(offset)
    except (ValueError, AttributeError, TypeError, OverflowError) as error:
        raise InputError(
            f"{tensor.path}: {tensor.name} is no proper quant_state ({error}); download it again"
        ) from error
    if not right or dtype is None:
        raise InputError(
            f"{tensor.path}: {tensor.name} says {json.dumps(state)[:300]}, expected {json.dumps(wanted)} and a dtype "
            "of 16 or 32 bits; quantise the model again with these settings"
        )
    return dtype, offset


def _check_table(entry: TensorEntry, levels: np.ndarray) -> None:
    # Not to the last bit: PyTorch computes the table of 256 a little differently on other processors.
    if not np.allclose(_read(entry), levels, rtol=0, atol=1e-6):
        raise InputError(f"{entry.path}: {entry.name} is no table of bitsandbytes; quantise the model again")


def _read(entry: TensorEntry) -> np.ndarray:
    array = np.empty(entry.shape, READABLE[entry.dtype])
    read_tensor(entry, array)
    return array


def _read_finite(entry: TensorEntry) -> np.ndarray:
    array = np.empty(entry.shape, READABLE[entry.dtype])
    read_finite(entry, array)
    return array


def tensor_sources(entry: LayoutEntry, weight: Quantized) -> list[TensorSource]:
    """What to write for one layer of a stack of quantised weights."""
    layer = entry.layer

    def source(
        name: str, array: Arrays, shape: tuple[int, ...], change: Callable[[np.ndarray], np.ndarray] = np.asarray
    ) -> TensorSource:
        # Sliced before it comes to the host: jax keeps the host's copy of an array that it has fetched.
        return TensorSource(name, array.dtype, shape, partial(lambda array: change(to_host(array[layer])), array))

    def constant(name: str, array: np.ndarray) -> TensorSource:
        return TensorSource(name, array.dtype, array.shape, lambda: array)

    if isinstance(weight, Int8Weight):
        module = entry.name.removesuffix(".weight")
        return [
            source(entry.name, weight.codes, entry.shape),
            source(f"{module}.SCB", weight.absmax, entry.shape[:1]),
            constant(f"{module}.weight_format", np.zeros((), np.uint8)),
        ]
    assert isinstance(weight, NF4Weight)
    size = math.prod(entry.shape)
    state: dict[str, object] = {
        "quant_type": weight.quant_type,
        "blocksize": BLOCK_SIZE,
        "dtype": weight.dtype.name,
        "shape": list(entry.shape),
    }
    tensors = [
        source(entry.name, weight.codes, (-(-size // 2), 1), neighbours if weight.by_halves else np.asarray),
        source(f"{entry.name}.absmax", weight.absmax, (-(-size // BLOCK_SIZE),)),
        constant(f"{entry.name}.quant_map", weight.levels),
    ]
    if weight.nested_absmax is not None and weight.offset is not None:
        state |= {
            "nested_blocksize": NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": float(to_host(weight.offset[layer])),
        }
        tensors += [
            source(f"{entry.name}.nested_absmax", weight.nested_absmax, weight.nested_absmax.shape[1:]),
            constant(f"{entry.name}.nested_quant_map", dynamic_map(signed=True)),
        ]
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return [*tensors, constant(f"{entry.name}{STATE}{weight.quant_type}", text)]


def config_section(weights: Mapping[LeafPath, LeafValue], dtype: str, earlier: object) -> dict[str, object] | None:
    """The `quantization_config` to write for a model's state; None where nothing in it is quantised.

    Args:
        weights: By path: arrays, and what stands in place of them.
        dtype: Of the model.
        earlier: The section that the model was read with, whose settings that concern computing alone are kept.

    Raises:
        InputError: Where the weights are quantised in more than one way.
    """
    quantized = {path: value for path, value in weights.items() if isinstance(value, Quantized)}
    if not quantized:
        return None
    kinds = {(value.quant_type, value.double_quant) for value in quantized.values()}
    if len(kinds) > 1:
        raise InputError(
            f"the model's weights are quantised in {len(kinds)} ways, and a checkpoint has one; expected one"
        )
    kind, double_quant = kinds.pop()
    four = kind in FOUR_BIT
    plain = [path[-2] for path, value in weights.items() if is_quantizable(path, value.shape) and path not in quantized]
    kept = ("bnb_4bit_compute_dtype", "llm_int8_threshold", "llm_int8_enable_fp32_cpu_offload")
    earlier = earlier if isinstance(earlier, dict) else {}
    return {
        "bnb_4bit_compute_dtype": dtype,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_threshold": 6.0,
        **{name: earlier[name] for name in kept if name in earlier},
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": kind if four else "fp4",  # what transformers writes where it means nothing
        "bnb_4bit_use_double_quant": double_quant,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": [*plain, "lm_head"] if plain else None,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "quant_method": "bitsandbytes",
    }
