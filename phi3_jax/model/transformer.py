"""The model without its head: embedding, decoder layers, final norm."""

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from phi3_jax.config.model import Phi3Config
from phi3_jax.model.attention import without_cache
from phi3_jax.model.dropout import DropKey
from phi3_jax.model.layers import Embedding, Phi3DecoderLayer, RMSNorm
from phi3_jax.model.protocols import Adapters
from phi3_jax.model.remat import LAYER_INPUT, checkpoint_name, remat_policy
from phi3_jax.model.rope import rope_cos_sin
from phi3_jax.model.sequence import piece_count, shards
from phi3_jax.model.walk import Layer, LayerStack
from phi3_jax.parallel.sharding import constrain


class Phi3Model(nnx.Module):
    """Embedding, the stacked decoder layers, and the final norm."""

    def __init__(self, config: Phi3Config, dtype: DTypeLike, rngs: nnx.Rngs):
        self.embed_tokens = Embedding(
            config.vocab_size, config.hidden_size, config.pad_token_id, config.initializer_range, dtype, rngs
        )
        self.layers = Phi3DecoderLayer(config, dtype, rngs, stack=(config.num_hidden_layers,))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.config = config

    def stack(self, adapters: Adapters, dropout_key: DropKey | None = None) -> LayerStack:
        """The decoder layers with what the adapters of this module have for them."""
        return LayerStack.of(self.layers, self.config.num_hidden_layers, adapters.get("layers", {}), dropout_key)

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        positions: Int[Array, "batch seq"],
        segment_ids: Int[Array, "batch seq"],
        adapters: Adapters,
        dropout_key: DropKey | None,
        attention: str,
        remat: bool | str,
        collect: bool,
        chunk_mlp: int | str = "none",
    ) -> tuple[Float[Array, "batch seq hidden"], Float[Array, "layers batch seq hidden"] | None]:
        """The normed output of the last layer, and every layer's input if `collect`."""
        config = self.config
        cos_sin = rope_cos_sin(config, positions, segment_ids, x.dtype)
        # The ids, which are small, whole on every device: attention sees all keys of a row.
        attend = without_cache(constrain(segment_ids, "batch", None), config.sliding_window, attention)

        pieces = piece_count(chunk_mlp, x.shape[1] // shards(x.shape[1]))

        def step(x: Array, layer: Layer) -> tuple[Array, Array | None]:
            x = checkpoint_name(x, LAYER_INPUT)
            return layer(x, cos_sin, attend, pieces)[0], x if collect else None

        x, inputs = self.stack(adapters, dropout_key).scan(step, x, remat_policy(remat))
        return self.norm(x), inputs
