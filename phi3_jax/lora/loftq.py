"""LoftQ: a quantised base, and A and B initialised to what quantising lost (https://arxiv.org/abs/2310.08659)."""

import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Float

from phi3_jax.config.lora import LOFTQ_DEFAULTS, LoraConfig
from phi3_jax.config.peft_object import PeftConfig, as_lora_config
from phi3_jax.lora.adapters import ResidualLora
from phi3_jax.lora.fresh import assemble, by_layer_groups
from phi3_jax.lora.initialisers import residual
from phi3_jax.lora.targets import Module, checkpoint_name, config_targets
from phi3_jax.lora.tree import Lora
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.quant import Quantized, Quantizer, make_quantizer, quantize_model
from phi3_jax.system.errors import InputError

AandB = tuple[Float[np.ndarray, "r in"], Float[np.ndarray, "out r"]]

BITS = {"nf4": 4, "int8": 8}


class LoftqQuantizer:
    """Quantises weights one by one, as `Checkpoint.load_model` hands them out, and keeps the A and B to begin with.

    For a weight W and each iteration, Q = quantised(W - s · B A), and B A the nearest to (W - Q) / s
    of its rank; at first B A is zero. What trains is Q + s · B A.

    Differs from PEFT's `loftq_init` in the scale s, which that leaves out: equal where α = r.

    Args:
        model: Its shapes say what the configuration's targets are; an abstract one will do.
        config: With `loftq_config`, or PEFT's defaults of that.
        quantization: `nf4` or `int8`.
        double_quant: Whether nf4's scales are quantised too.

    Raises:
        InputError: For settings of LoftQ that do not fit the quantisation, and for targets outside the
            decoder layers, which are not quantised.
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
        self._initial: dict[str, AandB] = {}

    def __call__(self, name: str, weight: Float[np.ndarray, "out in"]) -> Quantized:
        """The quantised weight of the module that checkpoints call `name`.

        Args:
            name: `model.layers.3.mlp.down_proj`.
            weight: What is to be quantised.
        """
        targets = self._targets.get(name, [])
        quantized = self.quantizer(name, weight)
        wide = weight.astype(np.float32)
        for iteration in range(self.iterations if targets else 0):
            if iteration:
                rest = wide.copy()
                for module, own in targets:
                    a, b = self._initial[own]
                    rest[module.rows] -= self._scaling(own) * (b @ a)
                quantized = self.quantizer(name, rest.astype(weight.dtype))
            lost = wide - np.asarray(quantized.dequantize(np.float32))
            for module, own in targets:
                r, _ = self.config.rank_and_alpha(own)
                self._initial[own] = nearest_of_rank(lost[module.rows] / self._scaling(own), r)
        return quantized

    def _scaling(self, name: str) -> float:
        return self.config.scaling_of(*self.config.rank_and_alpha(name))

    def lora(self, model: Phi3ForCausalLM) -> Lora:
        """The adapters for the quantised model, once every weight of it has come by here."""

        def make(part: Module, r: int, alpha: float, index: int) -> ResidualLora:
            del index
            a, b = (np.stack(arrays) for arrays in zip(*(self._initial[name] for name in part.names), strict=True))
            scaling = self.config.scaling_of(r, alpha)
            return residual((jnp.asarray(a), jnp.asarray(b)), scaling, self.config.lora_dropout, in_base=True)

        adapters = {m.name: by_layer_groups(m, self.config, self.num_layers, make) for m in self.modules}
        return assemble(model, self.config, self.modules, adapters)


def nearest_of_rank(matrix: Float[np.ndarray, "out in"], r: int) -> AandB:
    """A and B of rank r with B A nearest to `matrix`: √S Vᵀ and U √S of its r largest singular values.

    From the eigenvectors of the smaller Gram matrix, which takes seconds where a whole SVD takes a
    minute, and is as exact for the largest ones.
    """
    if matrix.shape[0] > matrix.shape[1]:
        a, b = nearest_of_rank(matrix.T, r)
        return b.T, a.T
    size = len(matrix)
    values, vectors = scipy.linalg.eigh(matrix @ matrix.T, subset_by_index=(size - r, size - 1))
    u = np.ascontiguousarray(vectors[:, ::-1], np.float32)
    root = np.sqrt(np.sqrt(np.maximum(values[::-1], 0))).astype(np.float32)
    # Uᵀ M is S Vᵀ. Directions of no length have nothing to give.
    a = (u.T @ matrix) / np.where(root > 0, root, 1)[:, None]
    return a, u * root


def loftq_init(
    model: Phi3ForCausalLM, config: LoraConfig | PeftConfig, *, quantization: str = "nf4", double_quant: bool = True
) -> tuple[Phi3ForCausalLM, Lora]:
    """The quantised model and the adapters of a model that is in memory unquantised.

    (`Checkpoint.load_model(..., quantizer=LoftqQuantizer(...))` never has it there.)

    Args:
        model: The base, unquantised.
        config: With `init_lora_weights: loftq`; see `LoftqQuantizer`. PEFT's own LoraConfig will do.
        quantization: `nf4` or `int8`.
        double_quant: Whether nf4's scales are quantised too.

    Raises:
        InputError: As `LoftqQuantizer` does.

    Example:
        >>> import jax
        >>> import phi3_jax as p3
        >>> from flax import nnx
        >>> sizes = dict(vocab_size=9, hidden_size=64, intermediate_size=64, num_hidden_layers=1, head_dim=32)
        >>> config = p3.Phi3Config(**sizes, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)
        >>> model = p3.Phi3ForCausalLM(config, rngs=nnx.Rngs(0))
        >>> quantized, lora = p3.loftq_init(model, p3.LoraConfig(r=8, init_lora_weights="loftq"))
        >>> weight = lambda model: model.model.layers.self_attn.o_proj.weight.get_value()
        >>> lost = weight(model)[0] - jax.tree.map(lambda x: x[0], weight(quantized)).dequantize(jnp.float32)
        >>> initial = lora.adapters["model"]["layers"]["self_attn"]["o_proj"].lora.delta()[0]
        >>> bool(jnp.linalg.norm(lost - initial) < 0.9 * jnp.linalg.norm(lost))
        True
    """
    quantizer = LoftqQuantizer(model, as_lora_config(config), quantization, double_quant=double_quant)
    quantized = quantize_model(model, quantization, double_quant=double_quant, quantizer=quantizer)
    return quantized, quantizer.lora(quantized)
