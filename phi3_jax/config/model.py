"""`Phi3Config`: what config.json says of a model."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from phi3_jax.system.errors import InputError
from phi3_jax.system.numbers import is_number, is_whole
from phi3_jax.system.reading import read_json
from phi3_jax.system.text import shown

# Far above every model there is, and small enough that shapes made of them can be computed with.
LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**13,
    "num_key_value_heads": 2**13,
    "head_dim": 2**14,
    "max_position_embeddings": 2**31 - 1,
}
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of a Phi-3 model.

    Attributes:
        theta: Base of the frequencies.
        partial_rotary_factor: Share of each head's dimensions that is rotated.
        original_max_position_embeddings: Positions up to which LongRoPE takes `short_factor`.
        short_factor: LongRoPE's divisors of the frequencies, one for each rotated pair of dimensions; None for the
            default RoPE.
        long_factor: The same for longer texts.
        attention_factor: Multiplies cos and sin; 1 for the default RoPE.
    """

    theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    original_max_position_embeddings: int = 4096
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    attention_factor: float = 1.0

    @property
    def is_longrope(self) -> bool:
        """Whether the frequencies depend on the length."""
        return self.long_factor is not None


@dataclass(frozen=True)
class Phi3Config:
    """A model of Hugging Face's model_type `phi3`; field names are config.json's, defaults Phi-3-mini's.

    Attributes:
        vocab_size: Rows of the embedding.
        hidden_size: Width of the residual stream.
        intermediate_size: Hidden units of the MLP.
        num_hidden_layers: Decoder layers.
        num_attention_heads: Heads of the queries.
        num_key_value_heads: Heads of keys and values, which divide those of the queries.
        head_dim: Width of a head.
        max_position_embeddings: Most positions in a row.
        rms_norm_eps: Added to the mean square in the norms.
        hidden_act: Activation of the MLP.
        initializer_range: Standard deviation of random weights.
        tie_word_embeddings: Whether the output head is the embedding.
        sliding_window: Positions that a position sees before itself; None for all.
        resid_pdrop: Dropout that Phi-3 has and does not use.
        attention_dropout: Dropout of attention, which cannot be trained with here.
        bos_token_id: Token before a text.
        eos_token_id: Token, or tokens, at its end.
        pad_token_id: Token of padding.
        rope: Rotary embedding.
        source: JSON text that the configuration was read from, so that saving writes back every key, also those that
            mean nothing here.
        generation: Text of generation_config.json, which belongs to the checkpoint as well: without its end tokens a
            chat model does not stop.

    Example:
        >>> from phi3_jax import Phi3Config
        >>> config = Phi3Config(hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=4)
        >>> config.qkv_sizes
        (16, 8, 8)
        >>> Phi3Config.from_dict(config.to_dict()) == config
        True
    """

    vocab_size: int = 32064
    hidden_size: int = 3072
    intermediate_size: int = 8192
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 96
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    resid_pdrop: float = 0.0
    attention_dropout: float = 0.0
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 32000
    pad_token_id: int | None = 32000
    rope: RopeConfig = RopeConfig()
    source: str = field(default="{}", compare=False, repr=False)
    generation: str = field(default="{}", compare=False, repr=False)

    @property
    def rotary_dim(self) -> int:
        """Dimensions of each head that are rotated (the first ones)."""
        return int(self.head_dim * self.rope.partial_rotary_factor)

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Rows of `qkv_proj` that make up q, k and v."""
        kv = self.num_key_value_heads * self.head_dim
        return self.num_attention_heads * self.head_dim, kv, kv

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Where an answer ends: generation_config.json's `eos_token_id`, else config.json's."""
        ends = json.loads(self.generation).get("eos_token_id", self.eos_token_id)
        return () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)

    def check_trainable(self, where: str = "config.json") -> None:
        """Raises `InputError` for a model that cannot be trained, as it drops attention; `where` names its file."""
        if self.attention_dropout > 0:
            raise InputError(
                f"{where}: attention_dropout is {self.attention_dropout}, expected 0 in training; set it to 0"
            )

    @classmethod
    def from_dict(cls, raw: Mapping[str, object], *, where: str = "config.json") -> "Phi3Config":
        """Reads the contents of a config.json.

        Args:
            raw: In the old style (`rope_theta`, `rope_scaling`) or that of transformers 5 (`rope_parameters`).
            where: What error messages call it.

        Raises:
            InputError: Another model_type, impossible sizes, values of the wrong type, unknown kinds of RoPE, LongRoPE
                factors of the wrong number.
        """
        if raw.get("model_type") != "phi3":
            raise InputError(
                f"{where}: model_type is {shown(raw.get('model_type'))}, expected 'phi3'; "
                "give a checkpoint of the Phi-3 family"
            )
        # transformers fills what config.json leaves out with Phi-3-mini's values; so do we.
        values: dict[str, Any] = {f.name: raw[f.name] for f in fields(cls) if raw.get(f.name) is not None}
        for name in ("rope", "source", "generation"):
            values.pop(name, None)
        values["num_attention_heads"] = heads = raw.get("num_attention_heads", 32)
        values["num_key_value_heads"] = raw.get("num_key_value_heads") or heads
        values["pad_token_id"] = raw.get("pad_token_id", 32000)
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = tuple(values["eos_token_id"])
        _check_sizes(values, where)
        _check_others(values, where)
        _check_tokens(values, where)
        values["head_dim"] = raw.get("head_dim") or values.get("hidden_size", 3072) // heads
        config = cls(**values, source=json.dumps(dict(raw)))
        return replace(config, rope=_read_rope(raw, config, where))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Phi3Config":
        """Reads `folder/config.json`, and `folder/generation_config.json` where there is one.

        Raises:
            InputError: As `from_dict`, and for files that are missing or no JSON.
        """
        path = Path(folder) / "config.json"
        config = cls.from_dict(read_json(path, "give a checkpoint folder with a config.json"), where=str(path))
        generation = Path(folder) / "generation_config.json"
        if not generation.exists():
            return config
        raw = read_json(generation)
        _check_tokens(raw, str(generation))
        return replace(config, generation=json.dumps(raw))

    def to_dict(self) -> dict[str, Any]:
        """What to write as config.json: loads in transformers 4 and 5, and reads back equal."""
        raw: dict[str, Any] = json.loads(self.source)
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("rope", "source", "generation") or (f.name == "head_dim" and "head_dim" not in raw):
                continue
            raw[f.name] = list(value) if isinstance(value, tuple) else value
        if self.head_dim * self.num_attention_heads != self.hidden_size:
            raw["head_dim"] = self.head_dim
        rope = self.rope
        raw["architectures"] = ["Phi3ForCausalLM"]
        raw["model_type"] = "phi3"
        # One style, the old one: every transformers release since 4.41 reads it, `su` no longer.
        raw.pop("rope_parameters", None)
        raw["rope_theta"] = rope.theta
        raw["partial_rotary_factor"] = rope.partial_rotary_factor
        raw["original_max_position_embeddings"] = rope.original_max_position_embeddings
        raw["rope_scaling"] = None
        if rope.short_factor is not None and rope.long_factor is not None:
            raw["rope_scaling"] = {
                "type": "longrope",
                "short_factor": list(rope.short_factor),
                "long_factor": list(rope.long_factor),
            }
            if rope.attention_factor != _attention_factor(
                self.max_position_embeddings / rope.original_max_position_embeddings,
                rope.original_max_position_embeddings,
            ):
                raw["rope_scaling"]["attention_factor"] = rope.attention_factor
        return raw


def _check_sizes(values: Mapping[str, Any], where: str) -> None:
    for name, most in LARGEST.items():
        value = values.get(name, 1)
        if not is_whole(value) or not 1 <= value <= most:
            raise InputError(f"{where}: {name} is {shown(value)}, expected a positive whole number, {most} at most")
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    hidden = values.get("hidden_size", 3072)
    if heads % kv_heads:
        raise InputError(f"{where}: {heads} attention heads cannot share {kv_heads} key-value heads evenly")
    if "head_dim" not in values and hidden % heads:
        raise InputError(f"{where}: hidden_size {hidden} is no multiple of {heads} attention heads")
    act = values.get("hidden_act", "silu")
    if act not in ACTIVATIONS:
        raise InputError(f"{where}: hidden_act is {shown(act)}, expected one of {', '.join(ACTIVATIONS)}")


def _check_others(values: Mapping[str, object], where: str) -> None:
    """Raises `InputError` for a value of the wrong type among those that are no sizes."""
    for name in ("rms_norm_eps", "initializer_range", "resid_pdrop", "attention_dropout"):
        value = values.get(name, 0)
        if not is_number(value) or not 0 <= value <= 1:
            raise InputError(f"{where}: {name} is {shown(value)}, expected a number from 0 to 1")
    tied = values.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise InputError(f"{where}: tie_word_embeddings is {shown(tied)}, expected true or false")
    window = values.get("sliding_window", 1)
    if not is_whole(window) or window < 1:
        raise InputError(f"{where}: sliding_window is {shown(window)}, expected a positive whole number or null")


def _check_tokens(values: Mapping[str, object], where: str) -> None:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = values.get(name)
        tokens = value if name == "eos_token_id" and isinstance(value, list | tuple) else [value]
        # -1 is an old way to say that there is none.
        if value is not None and not all(is_whole(token) and -1 <= token < 2**31 for token in tokens):
            raise InputError(f"{where}: {name} is {shown(value)}, expected a token's number")


def _attention_factor(scale: float, original: int) -> float:
    """LongRoPE's factor on cos and sin: sqrt(1 + ln(scale) / ln(original)), 1 without extension."""
    return 1.0 if scale <= 1 else math.sqrt(1 + math.log(scale) / math.log(original))


def _read_rope(raw: Mapping[str, object], config: Phi3Config, where: str) -> RopeConfig:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise InputError(f"{where}: rope parameters are a {type(rope).__name__}, expected an object")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    # Phi-3's first files said `su` (and, for a while, `yarn`) for what is now called `longrope`.
    if kind not in ("default", "longrope", "su", "yarn"):
        raise InputError(f"{where}: rope type {shown(kind)} is not Phi-3's; expected 'default' or 'longrope'")

    def number(name: str, default: float, least: float, most: float) -> float:
        value = next((part[name] for part in (rope, raw) if part.get(name) is not None), default)
        if not is_number(value) or not least <= value <= most:
            raise InputError(f"{where}: {name} is {shown(value)}, expected a number from {least:g} to {most:g}")
        return value

    default = config.max_position_embeddings if kind == "default" else 4096
    # From 2: LongRoPE's attention factor divides by its logarithm.
    original = int(number("original_max_position_embeddings", max(2, default), 2, 2**31 - 1))
    common: dict[str, Any] = {
        "theta": float(number("rope_theta", 10000.0, 1, 1e15)),
        "partial_rotary_factor": float(number("partial_rotary_factor", 1.0, 1e-6, 1)),
        "original_max_position_embeddings": original,
    }
    plain = RopeConfig(**common)
    rotated = replace(config, rope=plain).rotary_dim
    if rotated % 2 or not rotated:
        raise InputError(
            f"{where}: RoPE turns {rotated} of head_dim {config.head_dim}, expected an even number; "
            "check head_dim and partial_rotary_factor"
        )
    if kind == "default":
        return plain
    pairs = rotated // 2
    factors: dict[str, Any] = {}
    for name in ("short_factor", "long_factor"):
        values = rope.get(name)
        if not isinstance(values, list | tuple) or not all(is_number(v) and 0 < v < 1e9 for v in values):
            raise InputError(f"{where}: {name} is {shown(values)}, expected a list of {pairs} positive numbers")
        if len(values) != pairs:
            raise InputError(
                f"{where}: {name} has {len(values)} numbers, expected {pairs} (half the rotated dimensions)"
            )
        factors[name] = tuple(float(v) for v in values)
    scale = number("factor", config.max_position_embeddings / original, 1e-9, 1e9)
    attention_factor = number("attention_factor", _attention_factor(scale, original), 1e-6, 1e6)
    return RopeConfig(**common, **factors, attention_factor=float(attention_factor))
