"""loralib in JAX: LoRA for the linear layers, embeddings and convolutions of any Flax NNX model.

`import phi3_jax.loralib as lora` where a script has `import loralib as lora`; docs/loralib.md has both
side by side.
"""

from phi3_jax.lora.adapters import LoraEmbedding, LoraLinear
from phi3_jax.loralib.adapted import LoRALayer, LoraParam
from phi3_jax.loralib.functional import Adapters, apply, extract, init, merge, unmerge
from phi3_jax.loralib.modules import Conv1d, Conv2d, Conv3d, Embedding, Linear, MergedLinear
from phi3_jax.loralib.own_adapters import Config, LoraConv, LoraMergedLinear
from phi3_jax.loralib.state_dict import load_lora_state_dict, lora_state_dict, mark_only_lora_as_trainable

__all__ = [
    "Adapters",
    "Config",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "LoRALayer",
    "LoraConv",
    "LoraEmbedding",
    "LoraLinear",
    "LoraMergedLinear",
    "LoraParam",
    "MergedLinear",
    "apply",
    "extract",
    "init",
    "load_lora_state_dict",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merge",
    "unmerge",
]
