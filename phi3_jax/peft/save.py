"""Adapters written for PEFT: adapter_config.json, adapter_model.safetensors and a model card."""

import json
import math
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from phi3_jax.config.lora import LoraConfig
from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.hf.safetensors_io import TensorSource, write_safetensors
from phi3_jax.hf.save_tokenizer import save_tokenizer
from phi3_jax.lora.tree import Lora
from phi3_jax.peft.card import model_card
from phi3_jax.peft.config import CONFIG_FILE, WEIGHTS_FILE, config_entries
from phi3_jax.peft.tensors import sources, to_peft
from phi3_jax.system.files import storing, temporary_folder


def save_adapter(
    folder: str | Path,
    lora: Lora,
    *,
    tokenizer: Tokenizer | None = None,
    base_model_name_or_path: str | None = None,
    revision: str | None = None,
) -> None:
    """Writes what `peft.PeftModel.from_pretrained` loads: config, float32 weights, a model card.

    Everything is written for the base as it is: adapters of slices as one of the fused layer, adapters
    that started as PiSSA, OLoRA or LoftQ as a plain one of twice the rank.

    An adapter that is in the folder already is replaced; should that be interrupted, the folder is
    left without adapter_config.json, so that nobody loads old and new mixed.

    Args:
        folder: Where to.
        lora: The adapter.
        tokenizer: Saved along where given.
        base_model_name_or_path: The base, which `AutoPeftModelForCausalLM` will look for; default: that of
            `lora.config`, at its revision.
        revision: Of the base on the hub, that the adapter was trained on.

    Raises:
        StorageError: Where the folder cannot be written.
        InputError: For adapters that no configuration of PEFT describes.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import jax
        >>> import phi3_jax as p3
        >>> from flax import nnx
        >>> config = p3.Phi3Config(
        ...     vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        ...     num_key_value_heads=2, head_dim=8, max_position_embeddings=32, pad_token_id=None,
        ... )
        >>> model = p3.Phi3ForCausalLM(config, rngs=nnx.Rngs(0))
        >>> folder = Path(tempfile.mkdtemp()) / "adapter"
        >>> lora = p3.init_lora(model, p3.LoraConfig(r=4), jax.random.key(0))
        >>> p3.save_adapter(folder, lora, base_model_name_or_path="someone/base", revision="v2")
        >>> sorted(file.name for file in folder.iterdir())
        ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    folder = Path(folder)
    files = AdapterFiles.of(lora, base_model_name_or_path, revision)
    with storing(folder, files.nbytes), temporary_folder(folder.parent, f".{folder.name}.") as temporary:
        if tokenizer is not None:
            save_tokenizer(tokenizer, temporary)
        files.write(temporary)
        _move(temporary, folder)


@dataclass(frozen=True)
class AdapterFiles:
    """What `save_adapter` writes of an adapter, for callers that see to it themselves that it comes to be whole.

    Attributes:
        config: What adapter_config.json says.
        tensors: Those of the weights.
        metadata: Of the file of weights.
    """

    config: LoraConfig
    tensors: list[TensorSource]
    metadata: dict[str, str]

    @classmethod
    def of(cls, lora: Lora, base: str | None = None, revision: str | None = None) -> Self:
        """Those of an adapter. Raises `InputError` as `save_adapter`, whose arguments these are."""
        modules, config, metadata = to_peft(_on_base(lora, base, revision))
        return cls(config, list(sources(modules, lora.saved)), metadata)

    @property
    def nbytes(self) -> int:
        """Of the weights."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def write(self, folder: Path) -> None:
        """Writes weights, model card and configuration, in this order."""
        write_safetensors(folder / WEIGHTS_FILE, self.tensors, self.metadata)
        card = model_card(self.config, sum(math.prod(tensor.shape) for tensor in self.tensors))
        (folder / "README.md").write_text(card, encoding="utf-8")
        entries = json.dumps(config_entries(self.config), indent=2, sort_keys=True)
        (folder / CONFIG_FILE).write_text(entries, encoding="utf-8")


def _on_base(lora: Lora, base: str | None, revision: str | None) -> Lora:
    """The adapter, whose configuration names this base; its own where none is given."""
    if not base:
        return lora if revision is None else replace(lora, config=replace(lora.config, revision=revision))
    return replace(lora, config=replace(lora.config, base_model_name_or_path=base, revision=revision))


def _move(temporary: Path, folder: Path) -> None:
    if not folder.exists():
        temporary.rename(folder)
        return
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    for file in sorted(temporary.iterdir(), key=lambda file: file.name == CONFIG_FILE):  # the config last
        if file.is_dir():  # a tokenizer's further chat templates
            shutil.rmtree(folder / file.name, ignore_errors=True)
        os.replace(file, folder / file.name)
