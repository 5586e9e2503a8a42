"""Adapters in PEFT's files: `PeftAdapter`, a folder or hub id opened once, and what is read from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from phi3_jax.config.hub_options import Hub
from phi3_jax.config.lora import LoraConfig
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.hf.finite import is_finite
from phi3_jax.hf.hub import SMALL_FILES, resolve_checkpoint
from phi3_jax.hf.layout import EMBEDDING, HEAD
from phi3_jax.hf.safetensors_io import FLOATS, TensorEntry, equals, read_header, read_metadata, read_tensor
from phi3_jax.hf.tokenizer import has_tokenizer
from phi3_jax.lora.adapters import AnyAdapter
from phi3_jax.lora.base_weights import weight_shape
from phi3_jax.lora.targets import saved_modules
from phi3_jax.lora.tree import Lora
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.peft.config import CONFIG_FILE, WEIGHTS_FILE, read_adapter_config, ties_weights
from phi3_jax.peft.folder import adapter_folder, is_checkpoint
from phi3_jax.peft.state import load_state, state_config
from phi3_jax.peft.targets import peft_modules, with_both_ends
from phi3_jax.peft.tensors import PREFIX, from_peft, peft_adapters, saved_names, tensor_names
from phi3_jax.system.errors import InputError
from phi3_jax.system.manifest import Damaged, check_files
from phi3_jax.system.reading import local_path

ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)
# With the tokenizer that training lays beside it.
ALL_FILES = (*SMALL_FILES, WEIGHTS_FILE)


@dataclass(frozen=True, eq=False)
class PeftAdapter:
    """A LoRA adapter that PEFT (or `save_adapter`) wrote; each of its files is read once, when first asked for.

    Attributes:
        name: The folder or hub id, as it was given.
        folder: Where its files lie here, which of a run's folder are those in its `adapter`.
    """

    name: str
    folder: Path

    @classmethod
    def open(cls, path_or_hub_id: str | Path, hub: Hub | None = None, *, patterns: Sequence[str] = ALL_FILES) -> Self:
        """Finds the folder, or the files in the hub's cache, where they are downloaded to.

        Args:
            path_or_hub_id: A folder (an adapter's, a run's, or a checkpoint's of a run), or the id of an adapter on
                the hub.
            hub: How the hub is asked; its revision is the adapter's own.
            patterns: Of the files to download.

        Raises:
            InputError: As `resolve_checkpoint` and `adapter_folder`, and for a checkpoint of a run that is damaged.
        """
        folder = adapter_folder(resolve_checkpoint(path_or_hub_id, hub, patterns=patterns))
        if is_checkpoint(folder):
            _check_undamaged(folder)
        return cls(str(path_or_hub_id), folder)

    @cached_property
    def config(self) -> LoraConfig:
        """What adapter_config.json says. Raises `InputError` as `read_adapter_config`."""
        return state_config(self.folder) if self._is_state_alone else read_adapter_config(self.folder)

    @property
    def _is_state_alone(self) -> bool:
        return not (self.folder / CONFIG_FILE).exists() and is_checkpoint(self.folder)

    @property
    def base(self) -> str | None:
        """The folder or hub id of the base that it was trained on."""
        return self.config.base_model_name_or_path

    @property
    def revision(self) -> str | None:
        """The base's revision that it was trained on; None for the main branch or a folder."""
        return self.config.revision

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer lies beside it, with the template that it was trained with."""
        return has_tokenizer(self.folder)

    @property
    def has_base_copies(self) -> bool:
        """Whether copies of the base's embedding or output head lie in its file, as PEFT saves beside adapters of
        these; False where there is no file that can be read."""
        path = self.folder / WEIGHTS_FILE
        return path.is_file() and not _base_weight_names().isdisjoint(read_header(path))

    def load(
        self, model: Phi3ForCausalLM, base: Checkpoint | None = None, *, lora_dropout: float | None = None
    ) -> Lora:
        """Its tensors, as float32 whatever their type in the file.

        Args:
            model: The base, whose names and shapes the adapter must fit; shapes in place of arrays are enough.
            base: The base's files, to hold copies of its embedding against where the model has shapes alone.
            lora_dropout: For training that goes on, None as the file says.

        Raises:
            InputError: As `load_adapter`.
        """
        config = self.config if lora_dropout is None else replace(self.config, lora_dropout=lora_dropout)
        if self._is_state_alone:
            return load_state(self.folder, config, model)
        path = self.folder / WEIGHTS_FILE
        if model.lm_head is None and ties_weights(self.folder):
            config = with_both_ends(config)
        if not path.is_file():
            # Of a hub's repository a pickle is not even downloaded, so it may be there unseen.
            found = "found only adapter_model.bin" if (self.folder / "adapter_model.bin").exists() else "not found"
            raise InputError(
                f"{self.folder}: {WEIGHTS_FILE} expected, {found} (a pickle, which can run code, is not opened); "
                "save the adapter as safetensors"
            )
        try:
            adapters = peft_adapters(model, config, peft_modules(model, config))
            saved = saved_modules(model, config.modules_to_save or ())
        except InputError as error:
            raise InputError(f"{self.folder / CONFIG_FILE}: {error}") from error
        arrays = self._read_tensors(model, base, _expected_shapes(model, adapters, saved))
        num_layers = model.config.num_hidden_layers
        weights = {name: [arrays[tensor] for tensor in saved_names(name, num_layers)] for name in saved}
        return from_peft(
            model,
            config,
            {name: _filled(name, adapter, arrays) for name, adapter in adapters.items()},
            {name: np.stack(w) if name.startswith("model.layers.") else w[0] for name, w in weights.items()},
            read_metadata(path),
        )

    def _read_tensors(
        self, model: Phi3ForCausalLM, base: Checkpoint | None, expected: Mapping[str, tuple[int, ...]]
    ) -> dict[str, np.ndarray]:
        path = self.folder / WEIGHTS_FILE
        entries = read_header(path)
        misfits = _misfits(entries, expected)
        if base is not None:
            self._check_base(base, misfits)
        types = [f"{entry.name} is {entry.dtype}" for entry in entries.values() if entry.dtype not in FLOATS]
        _raise_for(path, {**misfits, "of the wrong type": types})
        arrays = {name: _read(entries[name]) for name in expected}
        copies = [entry for name, entry in entries.items() if name not in expected]
        problems = {
            "not finite": [name for name, array in arrays.items() if not is_finite(array)],
            "not the base's, though modules_to_save does not name them": [
                entry.name for entry in copies if not _is_base_weight(entry, model, base)
            ],
        }
        _raise_for(path, problems)
        return arrays

    def _check_base(self, base: Checkpoint, misfits: Mapping[str, list[str]]) -> None:
        """Raises `InputError` for tensors that do not fit a base that is not the one that the adapter names."""
        found = {kind: names for kind, names in misfits.items() if names}
        if not found or self.base is None or local_path(self.base).resolve() == local_path(base.name).resolve():
            return
        counts = ", ".join(f"{len(names)} {kind}" for kind, names in found.items())
        example = (found.get("misshapen") or next(iter(found.values())))[0]
        raise InputError(
            f"{self.folder / WEIGHTS_FILE}: was trained on {self.base}, not on {base.name}: its tensors do not fit the "
            f"model ({counts}, such as {example}); give the base that it was trained on"
        )


def _check_undamaged(checkpoint: Path) -> None:
    """Raises `InputError` where the adapter in a checkpoint is not what the run wrote."""
    try:
        check_files(checkpoint, ADAPTER_FILES)
    except Damaged as damage:
        raise InputError(f"{checkpoint}: the checkpoint is damaged ({damage}); take another one") from damage
    except OSError as error:
        raise InputError(f"{checkpoint}: cannot be read ({error.strerror}); see to the disk") from error


def load_adapter(
    path_or_hub_id: str | Path,
    model: Phi3ForCausalLM,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Lora:
    """Reads a LoRA adapter that PEFT (or `save_adapter`) wrote, as float32 whatever its file's type.

    It becomes what `init_lora` makes for such a configuration; an adapter of a fused layer that is made
    of slices becomes those of the slices.

    Args:
        path_or_hub_id: A folder (an adapter's, a run's, or a checkpoint's of a run), or a hub id that is downloaded
            and cached.
        model: The base, whose names and shapes the adapter must fit.
        revision: Branch, tag or commit of the adapter on the hub.
        token: To log in to the hub with.
        cache_dir: Where downloads are kept.
        local_files_only: Never ask the network.

    Raises:
        InputError: For another kind of adapter, for every feature that is not supported, and, all at once, for
            tensors that are missing, unknown, misshapen or not finite. Pickles (adapter_model.bin) are never
            opened.

    Example:
        >>> import tempfile
        >>> import jax
        >>> import phi3_jax as p3
        >>> from flax import nnx
        >>> config = p3.Phi3Config(
        ...     vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        ...     num_key_value_heads=2, head_dim=8, max_position_embeddings=32, pad_token_id=None,
        ... )
        >>> model = p3.Phi3ForCausalLM(config, rngs=nnx.Rngs(0))
        >>> folder = tempfile.mkdtemp()
        >>> p3.save_adapter(folder, p3.init_lora(model, p3.LoraConfig(r=4), jax.random.key(0)))
        >>> p3.load_adapter(folder, model).config.r
        4
    """
    return PeftAdapter.open(path_or_hub_id, Hub(revision, token, cache_dir, local_files_only)).load(model)


def _filled(name: str, adapter: AnyAdapter, arrays: Mapping[str, np.ndarray]) -> AnyAdapter:
    changed: dict[str, Any] = {field: arrays[tensor] for field, tensor in tensor_names(name, adapter).items()}
    return replace(adapter, **changed)


def _expected_shapes(
    model: Phi3ForCausalLM, adapters: Mapping[str, AnyAdapter], saved: list[str]
) -> dict[str, tuple[int, ...]]:
    expected = {
        tensor: getattr(adapter, field).shape
        for name, adapter in adapters.items()
        for field, tensor in tensor_names(name, adapter).items()
    }
    for name in saved:
        shape = weight_shape(model, name)
        stacked = name.startswith("model.layers.")
        for tensor in saved_names(name, model.config.num_hidden_layers):
            expected[tensor] = shape[1:] if stacked else shape
    return expected


def _misfits(entries: Mapping[str, TensorEntry], expected: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """The tensors of a file that are not those of the adapter, by what is wrong with them."""
    # PEFT saves the untouched table along where embedding or output head have an adapter.
    known = {*expected, *_base_weight_names()}
    return {
        "missing": [name for name in expected if name not in entries],
        "unknown": [name for name in entries if name not in known],
        "misshapen": [
            f"{name} is {list(entries[name].shape)}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in entries and entries[name].shape != shape
        ],
    }


def _raise_for(path: Path, problems: Mapping[str, list[str]]) -> None:
    """One line for all that is wrong, at most three names of each kind."""
    parts = []
    for kind, names in problems.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{len(names)} {kind} ({'; '.join(names[:3])}{more})")
    if parts:
        raise InputError(f"{path}: tensors do not fit the model and {CONFIG_FILE}: {', '.join(parts)}")


def _read(entry: TensorEntry) -> np.ndarray:
    array = np.empty(entry.shape, np.float32)
    read_tensor(entry, array)
    return array


def _base_weight_names() -> set[str]:
    return {
        f"{PREFIX}{module}{part}.weight" for module in ("model.embed_tokens", "lm_head") for part in ("", ".base_layer")
    }


def _is_base_weight(entry: TensorEntry, model: Phi3ForCausalLM, base: Checkpoint | None) -> bool:
    """Whether a tensor is the base's own, but for the type that either has been rounded to."""
    head = model.lm_head if ".lm_head." in entry.name else None  # None, too, where both share one table
    weight = (model.model.embed_tokens if head is None else head).weight.get_value()
    if entry.shape != weight.shape:
        return False
    if isinstance(weight, jax.Array):
        return _is_rounded(entry, np.asarray(weight))
    if base is None or not base.has_weights:
        raise InputError(
            f"{entry.path}: holds a copy of the base's embeddings, which cannot be compared with a base that is not "
            "loaded; save the adapter without (PEFT's save_embedding_layers=False)"
        )
    stored = base.weights.tensors[".".join(EMBEDDING) if head is None else HEAD]
    array = np.empty(stored.shape, FLOATS[stored.dtype])
    read_tensor(stored, array)
    return _is_rounded(entry, array)


def _is_rounded(entry: TensorEntry, weight: np.ndarray) -> bool:
    return equals(entry, weight) or equals(entry, weight.astype(FLOATS[entry.dtype]))
