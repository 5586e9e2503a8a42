"""`Checkpoint`: a model's folder or hub id, opened once and handed on to whoever needs something of it."""

import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from phi3_jax.config.hub_options import Hub
from phi3_jax.config.model import Phi3Config
from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.hf.bnb import BnbConfig, read_bnb_config
from phi3_jax.hf.files import CONFIG, Weights, has_weights, read_weights
from phi3_jax.hf.hub import CHECKPOINT_FILES, resolve_checkpoint
from phi3_jax.hf.layout import EMBEDDING
from phi3_jax.hf.load import Shardings, WeightFiles
from phi3_jax.hf.safetensors_io import FLOATS
from phi3_jax.hf.tokenizer import has_tokenizer, read_tokenizer
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.leaves import abstract_model
from phi3_jax.quant import Quantizer, make_quantizer
from phi3_jax.quant.build import build_model
from phi3_jax.system.errors import InputError
from phi3_jax.system.telling import taking

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Where a model comes from, and what its files say; each of them is read once, when it is first asked for.

    Attributes:
        name: The folder or hub id, as it was given.
        folder: Where its files lie here.
        hub: How the hub was asked.
    """

    name: str
    folder: Path
    hub: Hub

    @classmethod
    def open(
        cls, path_or_hub_id: str | Path, hub: Hub | None = None, *, patterns: Sequence[str] = CHECKPOINT_FILES
    ) -> Self:
        """Finds the folder, or the files in the hub's cache, where they are downloaded to.

        Args:
            path_or_hub_id: A folder, or an id such as `microsoft/Phi-3-mini-4k-instruct`.
            hub: How the hub is asked.
            patterns: Of the files to download.

        Raises:
            InputError: As `resolve_checkpoint`.
        """
        hub = hub or Hub()
        return cls(str(path_or_hub_id), resolve_checkpoint(path_or_hub_id, hub, patterns=patterns), hub)

    @classmethod
    def open_config(cls, path_or_hub_id: str | Path, hub: Hub | None = None) -> Self:
        """The same for `config` and what follows from it alone: nothing else is downloaded."""
        return cls.open(path_or_hub_id, hub, patterns=(CONFIG,))

    @property
    def revision(self) -> str | None:
        """The revision that was asked for; None for the main branch, and for a folder, which has none."""
        return None if Path(self.name).expanduser().is_dir() else self.hub.revision

    @cached_property
    def config(self) -> Phi3Config:
        """What config.json and generation_config.json say. Raises `InputError` for what cannot be loaded."""
        if not (self.folder / CONFIG).exists():
            self._refuse_others()
        return Phi3Config.from_pretrained(self.folder)

    def _refuse_others(self) -> None:
        """Raises `InputError` for a folder that holds an adapter or a run, and no config.json."""
        for where in (self.folder, self.folder / "adapter"):
            if (where / "adapter_config.json").exists():
                raise InputError(
                    f"{where}: holds an adapter, no model; give its base model, and load the adapter beside it "
                    f"(--adapter {self.name}, which finds its base by itself where no model is given)"
                )
        if (self.folder / "model" / CONFIG).exists():
            raise InputError(f"{self.folder}: is a run, whose model is in {self.folder / 'model'}; give that")

    @cached_property
    def quantization(self) -> BnbConfig | None:
        """How its weights are quantised already; None where they are not. Raises `InputError` for other kinds."""
        return read_bnb_config(self.config, self.folder / CONFIG)

    @property
    def stored_dtype(self) -> str:
        """The type of its weights by transformers' rule for `"auto"`: that which config.json names; else that of the
        tensors, as the embedding tells; bfloat16, as Phi-3's are, where there are neither."""
        raw = json.loads(self.config.source)
        named = str(raw.get("dtype") or raw.get("torch_dtype")).removeprefix("torch.")
        if named in {kind.name for kind in FLOATS.values()}:
            return named
        table = self.weights.tensors.get(".".join(EMBEDDING)) if self.has_weights else None
        return FLOATS[table.dtype].name if table is not None and table.dtype in FLOATS else "bfloat16"

    @cached_property
    def shapes(self) -> Phi3ForCausalLM:
        """The model with shapes in place of arrays, to look names and shapes up in."""
        return abstract_model(self.config)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer, with the chat template. Raises `InputError` where there is none that can be read."""
        return self.own_tokenizer()

    def own_tokenizer(self) -> Tokenizer:
        """The one in its folder, read anew. Raises `InputError` as `tokenizer`."""
        if not has_tokenizer(self.folder) and not (self.folder / CONFIG).exists():
            self._refuse_others()
        return read_tokenizer(self.folder, self.name)

    @cached_property
    def weights(self) -> Weights:
        """The headers of its files of weights, held against `config`. Raises `InputError` with all that is wrong."""
        weights = read_weights(self.folder, self.config, self.quantization)
        weights.raise_for_problems(self.folder)
        return weights

    @property
    def has_weights(self) -> bool:
        """Whether there are files of weights beside config.json."""
        return has_weights(self.folder)

    def load_model(
        self,
        *,
        dtype: DTypeLike,
        quantization: str | None = None,
        double_quant: bool = True,
        quantizer: Quantizer | None = None,
        attention: str = "auto",
        shardings: Shardings | None = None,
        split: bool = False,
    ) -> Phi3ForCausalLM:
        """The model, its weights converted to `dtype`.

        Host memory holds, beside what the device holds, no more than a few layers' tensors of one stacked array (on
        CPUs nothing, since the device takes the host's memory), and of weights that are quantised no more than a few
        layers' in `dtype`. What bitsandbytes has quantised is loaded
        as it is.

        Args:
            dtype: float32, bfloat16 or float16.
            quantization: `nf4` or `int8`: what the decoder layers' linear weights are quantised to while
                they are read, after they are rounded to `dtype`.
            double_quant: Quantise the statistics of NF4 too.
            quantizer: Takes the place of these two, for starts that look at each weight before it is
                rounded (LoftQ). It is called with a module's name in the checkpoint and its weight, from several
                threads at once, and gives a quantised weight of numpy arrays.
            attention: The model's kernel, see `model.attention.attend`.
            shardings: How devices share the weights; None where one device has all.
            split: Hold fused weights in their parts, whose rows devices share evenly.

        Raises:
            InputError: With everything that is wrong with the checkpoint at once: missing, unknown, doubled and
                misshapen tensors, shards that are missing or cut off. Also for a checkpoint that is quantised
                already, otherwise than asked for.
        """
        dtype = _float_dtype(dtype)
        if self.quantization is not None and self.quantization.mixed:
            logger.warning(
                "%s: %d weights are quantised whose kin in other layers are not; all layers of these are held in %s",
                self.name,
                len(self.quantization.mixed),
                dtype,
            )
        if quantization is not None and quantizer is None:
            quantizer = make_quantizer(quantization, double_quant=double_quant)
        if self.quantization is not None and quantizer is not None:
            self._check_quantization(self.quantization, quantization, double_quant)
        empty = abstract_model(self.config, dtype, attention)
        weights = self.weights
        size = sum(file.stat().st_size for file in weights.files)
        doing = f"loading {self.name} ({size / 1e9:.1f} GB)" if size >= 10**8 else f"loading {self.name}"
        with taking(doing), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            source = WeightFiles(self.config, weights, self.quantization, dtype, quantizer, shardings, pool)
            return build_model(empty, source, split=split and shardings is not None)

    def check_unquantized(self, why: str, advice: str = "give the unquantised checkpoint") -> None:
        """Raises `InputError` where the weights are quantised, which `why` says is in the way."""
        if self.quantization is not None:
            raise InputError(f"{self.folder}: its weights are quantised, {why}; {advice}")

    def _check_quantization(self, stored: BnbConfig, quantization: str | None, double_quant: bool) -> None:
        if quantization != stored.kind or (stored.double_quant and not double_quant):
            wanted = quantization if double_quant else f"{quantization} without double quantisation"
            raise InputError(
                f"{self.folder}: is quantised already, to {stored}, and cannot be quantised to {wanted}; "
                "leave that out, or give the unquantised checkpoint"
            )


def _float_dtype(dtype: DTypeLike) -> np.dtype:
    try:
        result = jnp.dtype(dtype)
    except TypeError:
        result = None
    if result not in FLOATS.values():
        raise InputError(f"dtype is {dtype!r}, expected float32, bfloat16 or float16")
    return np.dtype(result)
