"""Decoding, measured: how many tokens a second once the prompts are read."""

import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.config.generation import GenerationConfig
from phi3_jax.generation.answers import Call
from phi3_jax.generation.engine import CHUNK, Rules, first_token
from phi3_jax.generation.sampling import Sampler
from phi3_jax.lora import Lora
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.cache import cache_bytes
from phi3_jax.parallel.hardware import hardware
from phi3_jax.system.errors import InputError
from phi3_jax.system.packages import package_versions
from phi3_jax.system.telling import taking


def benchmark_generate(
    model: Phi3ForCausalLM, lora: Lora | None, *, batch: int, prompt: int, new_tokens: int, rounds: int, seed: int = 0
) -> dict[str, object]:
    """Times greedy answers of `new_tokens` tokens to `batch` random prompts, `rounds` times after a first one.

    Returns:
        What `phi3-jax benchmark generate` prints as JSON: `tokens_per_second`, of the whole batch, at the median round,
        all tokens but each answer's first, which comes out of the prompt's pass; `token_seconds`, for one step of all
        rows; `prompt_seconds`, from the prompts on the host to each answer's first token, with all that `generate` does
        before it decodes; `compile_seconds`, the first round's time beyond the median's; `bytes_per_step`, the weights,
        adapters and cache that a step reads, dequantisation aside; `bandwidth_utilisation`, these bytes a second over
        the device's peak, None where that is not known; `device_kind`, `versions` and `settings`.

    Raises:
        InputError: For a prompt and answer beyond the model's positions, and for an answer of one token.
    """
    config = model.config
    if new_tokens < 2:
        raise InputError(f"{new_tokens} new tokens are no decoding: the first comes out of the prompt; give at least 2")
    if prompt + new_tokens > config.max_position_embeddings:
        raise InputError(
            f"a prompt of {prompt} tokens and {new_tokens} new ones exceed the model's "
            f"{config.max_position_embeddings} positions; give fewer"
        )
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (batch, prompt), np.int32)
    with taking("compiling, and a first round"):
        timed = [_round(model, lora, tokens, new_tokens)]
    timed += [_round(model, lora, tokens, new_tokens) for _ in range(rounds)]
    (first, *others), (first_decoding, *decodings) = zip(*timed, strict=True)
    prompt_seconds, decode_seconds = statistics.median(others), statistics.median(decodings)
    steps = new_tokens - 1
    read = _bytes_per_step(model, lora, batch, prompt + new_tokens // 2)
    peaks = hardware()
    return {
        "tokens_per_second": batch * steps / decode_seconds,
        "token_seconds": decode_seconds / steps,
        "prompt_seconds": prompt_seconds,
        "compile_seconds": max(0.0, first + first_decoding - prompt_seconds - decode_seconds),
        "bytes_per_step": read,
        "bandwidth_utilisation": None if peaks is None else read * steps / decode_seconds / peaks.bandwidth,
        "device_kind": jax.devices()[0].device_kind,
        "versions": {
            "python": platform.python_version(),
            **package_versions("phi3_jax", "jax", "jaxlib", "flax"),
        },
        "settings": {
            "batch": batch,
            "prompt": prompt,
            "new_tokens": new_tokens,
            "rounds": rounds,
            "dtype": str(model.dtype),
            "hidden": config.hidden_size,
            "layers": config.num_hidden_layers,
            "vocab": config.vocab_size,
        },
    }


def _round(model: Phi3ForCausalLM, lora: Lora | None, tokens: np.ndarray, new_tokens: int) -> tuple[float, float]:
    """Seconds until the first tokens are there, and from then on; as `generate` does it, without end tokens."""
    start = time.perf_counter()
    settings = GenerationConfig(max_new_tokens=new_tokens)
    call = Call(model, lora, settings, tokens, np.ones_like(tokens), copies=1)
    logits, cache, padded = call.read_prompts()
    rules = Rules(Sampler.from_settings(settings), None, jnp.zeros(0, jnp.int32), jnp.zeros((), jnp.int32))
    progress = jax.block_until_ready(first_token(logits, padded, rules))
    middle = time.perf_counter()
    left = new_tokens - 1
    while left:
        steps = min(CHUNK, left)
        cache, progress, decoded, _ = call.engine.decode(cache, progress, rules, steps)
        jax.device_get(decoded)
        left -= steps
    return middle - start, time.perf_counter() - middle


def _bytes_per_step(model: Phi3ForCausalLM, lora: Lora | None, batch: int, length: int) -> int:
    """What has to come out of memory for one token of every row: all weights but the rows of the embedding that
    are not looked up, the adapters, and the keys and values of so many tokens."""
    from flax import nnx

    weights: int = sum(leaf.nbytes for leaf in jax.tree.leaves((nnx.state(model), lora)))
    if model.lm_head is not None:
        weights -= model.model.embed_tokens.weight[...].nbytes
    return weights + cache_bytes(model.config, batch, length, model.dtype)
