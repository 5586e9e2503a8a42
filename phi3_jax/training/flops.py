"""The arithmetic of a training step by its mathematics: what model FLOP utilisation is measured against."""

from phi3_jax.config.model import Phi3Config


def matmul_parameters(config: Phi3Config) -> int:
    """Weights that every token is multiplied with: all linear layers and the head, no embedding look-up."""
    width = config.num_attention_heads * config.head_dim
    attention = config.hidden_size * (sum(config.qkv_sizes) + width)
    mlp = 3 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * (attention + mlp) + config.vocab_size * config.hidden_size


def step_flops(config: Phi3Config, trainable: int, full: bool, tokens: int, attended: float) -> float:
    """FLOP that the mathematics of training on so many tokens takes, recomputation left out.

    Two for each weight and token in the forward pass and two in the backward pass for the
    activations' gradient, two more where the weight trains; attention takes 12 · layers · width for
    each pair of a token and a key that it sees (`attended` of them).
    """
    base = matmul_parameters(config) * (6 if full else 4)
    adapter = 0 if full else 6 * trainable
    width = config.num_attention_heads * config.head_dim
    return (base + adapter) * tokens + 12.0 * config.num_hidden_layers * width * attended
