"""LoftQ: a quantised base and an adapter that starts from what quantising lost (arXiv:2310.08659)."""

import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Float

from phi3_jax.config.lora import LOFTQ_DEFAULTS, LoraConfig
from phi3_jax.lora.adapters import LoraLinear, ResidualLora
from phi3_jax.lora.init import assemble, by_layer_groups
from phi3_jax.lora.targets import Module, checkpoint_name, config_targets
from phi3_jax.lora.tree import Lora
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.quant import Quantized, Quantizer, make_quantizer, quantize_model
from phi3_jax.system.errors import InputError

Start = tuple[Float[np.ndarray, "r in"], Float[np.ndarray, "out r"]]

BITS = {"nf4": 4, "int8": 8}


class LoftqQuantizer:
    """Quantises a model's weights one by one, as `load_model` hands them out, and keeps the adapters' starts.

    For a weight W and each iteration, Q = quantised(W - s · B A), and B A the nearest to (W - Q) / s
    of its rank; at first B A is zero. What trains is Q + s · B A.

    Differs from PEFT's `loftq_init` in the scale s, which that leaves out: equal where α = r.

    **Arguments**: `model`, whose shapes say what the configuration's targets are (an abstract one will
    do); `quantization`, `nf4` or `int8`.

    Raises `InputError` for settings of LoftQ that do not fit the quantisation, and for targets outside
    the decoder layers, which are not quantised.
    """

    def __init__(
        self, model: Phi3ForCausalLM, config: LoraConfig, quantization: str = "nf4", *, double_quant: bool = True
    ):
        settings = {**LOFTQ_DEFAULTS, **(config.loftq_config or {})}
        bits, self.iterations = settings["loftq_bits"], settings["loftq_iter"]
        if BITS.get(quantization) != bits:
            given = {bits: kind for kind, bits in BITS.items()}.get(bits, "no such kind")
            raise InputError(
                f"loftq_config has loftq_bits {bits} ({given}), but the base is quantised to {quantization}; "
                "make them agree"
            )
        if not isinstance(self.iterations, int) or self.iterations < 1:
            raise InputError(f"loftq_config has loftq_iter {self.iterations!r}, expected a whole number of at least 1")
        self.modules = config_targets(model, config)
        outside = [module.suffix for module in self.modules if not module.layers]
        if outside:
            raise InputError(
                f"init_lora_weights is loftq, but {', '.join(outside)} is not quantised; leave it out of target_modules"
            )
        for module in self.modules:
            for name in module.names:
                if config.rank_and_alpha(name)[0] > min(module.shape):
                    raise InputError(
                        f"r is {config.rank_and_alpha(name)[0]}, but {name} has only {min(module.shape)} directions"
                    )
        self.config = config
        self.num_layers = model.config.num_hidden_layers
        self.quantizer: Quantizer = make_quantizer(quantization, double_quant=double_quant)
        self._targets: dict[str, list[tuple[Module, str]]] = {}
        for module in self.modules:
            for layer, name in zip(module.layers, module.names, strict=True):
                self._targets.setdefault(checkpoint_name(module.parent, layer), []).append((module, name))
        self._starts: dict[str, Start] = {}

    def __call__(self, name: str, weight: Float[np.ndarray, "out in"]) -> Quantized:
        """The quantised weight of the module that checkpoints call `name`."""
        targets = self._targets.get(name, [])
        quantized = self.quantizer(name, weight)
        wide = weight.astype(np.float32)
        for iteration in range(self.iterations if targets else 0):
            if iteration:
                rest = wide.copy()
                for module, own in targets:
                    a, b = self._starts[own]
                    rest[module.rows] -= self._scaling(own) * (b @ a)
                quantized = self.quantizer(name, rest.astype(weight.dtype))
            lost = wide - np.asarray(quantized.dequantize(np.float32))
            for module, own in targets:
                self._starts[own] = low_rank(lost[module.rows] / self._scaling(own), self.config.rank_and_alpha(own)[0])
        return quantized

    def _scaling(self, name: str) -> float:
        return self.config.scaling_of(*self.config.rank_and_alpha(name))

    def lora(self, model: Phi3ForCausalLM) -> Lora:
        """The adapters for the quantised model, once every weight of it has come by here."""

        def make(part: Module, r: int, alpha: float, index: int) -> ResidualLora:
            del index
            starts = zip(*(self._starts[name] for name in part.names), strict=True)
            a, b = (jnp.asarray(np.stack(arrays)) for arrays in starts)
            lora = LoraLinear(a, b, self.config.scaling_of(r, alpha), self.config.lora_dropout)
            return ResidualLora(lora, jnp.copy(a), jnp.copy(b), in_base=True)

        adapters = {m.name: by_layer_groups(m, self.config, self.num_layers, make) for m in self.modules}
        return assemble(model, self.config, self.modules, adapters)


def low_rank(matrix: Float[np.ndarray, "out in"], r: int) -> Start:
    """A and B of rank r with B A nearest to `matrix`: √S Vᵀ and U √S of its r largest singular values.

    From the eigenvectors of the smaller Gram matrix, which takes seconds where a whole SVD takes a
    minute, and is as exact for the largest ones.
    """
    if matrix.shape[0] > matrix.shape[1]:
        a, b = low_rank(matrix.T, r)
        return b.T, a.T
    size = len(matrix)
    values, vectors = scipy.linalg.eigh(matrix @ matrix.T, subset_by_index=(size - r, size - 1))
    u = np.ascontiguousarray(vectors[:, ::-1], np.float32)
    root = np.sqrt(np.sqrt(np.maximum(values[::-1], 0))).astype(np.float32)
    # Uᵀ M is S Vᵀ. Directions of no length have nothing to give.
    a = (u.T @ matrix) / np.where(root > 0, root, 1)[:, None]
    return a, u * root


def loftq_init(
    model: Phi3ForCausalLM, config: LoraConfig, *, quantization: str = "nf4", double_quant: bool = True
) -> tuple[Phi3ForCausalLM, Lora]:
    """The quantised model and the adapters of a model that is in memory unquantised.

    (`load_model(..., quantizer=LoftqQuantizer(...))` never has it there.) Raises `InputError` as
    `LoftqQuantizer` does.
    """
    quantizer = LoftqQuantizer(model, config, quantization, double_quant=double_quant)
    quantized = quantize_model(model, quantization, double_quant=double_quant, quantizer=quantizer)
    return quantized, quantizer.lora(quantized)
