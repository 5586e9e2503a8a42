"""Next-token cross-entropy over the target tokens."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from phi3_jax.data.batch import Batch
from phi3_jax.data.vocabulary import check_ids
from phi3_jax.lora.tree import Lora
from phi3_jax.model.documents import documents, token_counts
from phi3_jax.model.ids import at_hand, check_input_ids
from phi3_jax.model.logits import adapted_logits
from phi3_jax.model.phi3 import Phi3ForCausalLM
from phi3_jax.objectives.cross_entropy import cross_entropy_sums, token_losses
from phi3_jax.system.errors import InputError

IGNORED_LABEL = -100  # transformers' mark of a token that is no target


def loss(
    model: Phi3ForCausalLM,
    lora: Lora | None,
    batch: Batch,
    *,
    dropout_key: PRNGKeyArray | None = None,
    remat: bool | str = False,
    chunk_mlp: int | str = "auto",
    label_smoothing: float = 0.0,
    neftune_alpha: float | None = None,
) -> Float[Array, ""]:
    """Mean cross-entropy over the batch's target tokens, float32.

    Args:
        model: the base, which gets no gradient here.
        lora: the adapters to differentiate by; None for the base alone.
        batch: `input_ids` `[batch, seq]` and what else of the model's `attention_mask`,
            `segment_ids` and `positions` applies. The targets are the tokens where `loss_mask` is 1; or
            those of transformers' `labels` that are not -100; or, with neither, every real token. A token
            is predicted from the one before it, so that the first of a row, or of a packed document, is
            never a target.
        dropout_key: training mode, see `Phi3ForCausalLM`.
        remat: recompute each layer in the backward pass instead of keeping its activations; see
            `Phi3ForCausalLM`.
        chunk_mlp: in how many pieces long rows go through what looks at each position by itself; see
            `Phi3ForCausalLM`.
        label_smoothing: ε of (1 − ε) · cross-entropy + ε · mean over the vocabulary of −log p, as
            transformers' `LabelSmoother` and PyTorch's `CrossEntropyLoss`.
        neftune_alpha: noise on the embeddings in training mode, see `neftune_noise`.

    Raises:
        InputError: for a batch without `input_ids`, or with both `loss_mask` and `labels`; and for an id that the
            embedding has no row for, unless `jax.jit` compiles the loss with the batch as an argument: a
            program cannot raise, and what it makes of such an id is NaN or another row's loss.

    Example:
        >>> import jax, jax.numpy as jnp, phi3_jax as p3
        >>> from flax import nnx
        >>> sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        >>> config = p3.Phi3Config(**sizes, num_attention_heads=2, num_key_value_heads=1)
        >>> model = p3.Phi3ForCausalLM(config, rngs=nnx.Rngs(0))
        >>> lora = p3.init_lora(model, p3.LoraConfig(r=2, target_modules="all-linear"), jax.random.key(0))
        >>> batch = {"input_ids": jnp.array([[1, 5, 9, 7]]), "loss_mask": jnp.array([[0, 0, 1, 1]])}
        >>> value, gradients = jax.value_and_grad(lambda lora: p3.loss(model, lora, batch))(lora)
        >>> value.shape, jax.tree.structure(gradients) == jax.tree.structure(lora)
        ((), True)
    """
    total, count, _ = loss_sums(
        model,
        lora,
        batch,
        dropout_key=dropout_key,
        remat=remat,
        chunk_mlp=chunk_mlp,
        label_smoothing=label_smoothing,
        neftune_alpha=neftune_alpha,
    )
    return total / jnp.maximum(count, 1)


def loss_sums(
    model: Phi3ForCausalLM,
    lora: Lora | None,
    batch: Batch,
    *,
    dropout_key: PRNGKeyArray | None = None,
    remat: bool | str = False,
    chunk_mlp: int | str = "auto",
    label_smoothing: float = 0.0,
    neftune_alpha: float | None = None,
) -> tuple[Float[Array, ""], Int[Array, ""], Int[Array, ""]]:
    """What `loss` is the quotient of: the sum over target tokens, their number, and how many of
    them the model holds most likely.

    Sums of parts of a batch add up to those of the whole; means do not, where the parts have
    different numbers of targets.
    """
    _check_ids(batch, model.config.vocab_size)
    targets, is_target = next_tokens(batch)
    noise_key, dropout_key = split_noise_key(dropout_key, neftune_alpha)
    x = _last_hidden_state(
        model,
        lora,
        batch,
        inputs_embeds=None if noise_key is None else noisy_embeddings(model, lora, batch, noise_key, neftune_alpha),
        dropout_key=dropout_key,
        remat=remat,
        chunk_mlp=chunk_mlp,
    )
    head, adapters = model.head(lora)
    total, correct = cross_entropy_sums(
        x,
        head,
        targets,
        is_target,
        label_smoothing=label_smoothing,
        adjust=adapted_logits,
        adapters=adapters,
        key=dropout_key,
    )
    return total, jnp.sum(is_target), correct


def row_sums(
    model: Phi3ForCausalLM, lora: Lora | None, batch: Batch, *, chunk_mlp: int | str = "auto"
) -> tuple[Float[Array, "batch"], Int[Array, "batch"], Int[Array, "batch"]]:
    """`loss_sums` of every row by itself, for evaluation."""
    _check_ids(batch, model.config.vocab_size)
    targets, is_target = next_tokens(batch)
    x = _last_hidden_state(model, lora, batch, chunk_mlp=chunk_mlp)
    head, adapters = model.head(lora)
    losses, is_right = token_losses(x, head, targets, adjust=adapted_logits, adapters=adapters)
    return (
        jnp.sum(losses, axis=1, where=is_target),
        jnp.sum(is_target, axis=1),
        jnp.sum(is_target & is_right, axis=1),
    )


def _last_hidden_state(
    model: Phi3ForCausalLM,
    lora: Lora | None,
    batch: Batch,
    *,
    inputs_embeds: Float[Array, "batch seq hidden"] | None = None,
    dropout_key: PRNGKeyArray | None = None,
    remat: bool | str = False,
    chunk_mlp: int | str = "auto",
) -> Float[Array, "batch seq hidden"]:
    return model.last_hidden_state(
        jnp.asarray(batch["input_ids"]),
        attention_mask=None if "segment_ids" in batch else batch.get("attention_mask"),
        positions=batch.get("positions"),
        segment_ids=batch.get("segment_ids"),
        lora=lora,
        inputs_embeds=inputs_embeds,
        dropout_key=dropout_key,
        remat=remat,
        chunk_mlp=chunk_mlp,
    )


def _check_ids(batch: Batch, table_rows: int) -> None:
    """Looks at the ids of real tokens, and at the labels, where their values are at hand."""
    if "input_ids" in batch:
        check_input_ids(table_rows, batch["input_ids"], batch.get("attention_mask"), batch.get("segment_ids"))
    labels = at_hand(batch["labels"]) if "labels" in batch else None
    if labels is not None:
        check_ids(np.where(labels == IGNORED_LABEL, 0, labels), table_rows, "labels")


def next_tokens(batch: Batch) -> tuple[Int[Array, "batch seq"], Bool[Array, "batch seq"]]:
    """For each position the token that follows, and whether it is a target."""
    segments = documents(batch)
    if "loss_mask" in batch and "labels" in batch:
        raise InputError("the batch has both loss_mask and labels; give one of them")
    tokens = jnp.asarray(batch["input_ids"])
    if "labels" in batch:
        labels = jnp.asarray(batch["labels"])
        is_target = labels != IGNORED_LABEL
        tokens = jnp.where(is_target, labels, 0)
    else:
        is_target = jnp.asarray(batch.get("loss_mask", segments)) != 0
    # With labels alone transformers asks the labels and nothing else, also at padding.
    if "labels" not in batch or "segment_ids" in batch:
        inside = (segments != 0) & (segments == jnp.roll(segments, 1, axis=1))
        is_target &= inside
    # Shifting the targets, not the logits, copies a vocabulary's width less.
    is_target = jnp.roll(is_target, -1, axis=1).at[:, -1].set(False)
    return jnp.roll(tokens, -1, axis=1), is_target


def split_noise_key(key: PRNGKeyArray | None, alpha: float | None) -> tuple[PRNGKeyArray | None, PRNGKeyArray | None]:
    """(key of NEFTune's noise, key of dropout), None where there is none of it."""
    if key is None or not alpha:
        return None, key
    noise_key, dropout_key = jax.random.split(key)
    return noise_key, dropout_key


def noisy_embeddings(
    model: Phi3ForCausalLM, lora: Lora | None, batch: Batch, key: PRNGKeyArray, alpha: float | None
) -> Float[Array, "batch seq hidden"]:
    """The embeddings of a batch with NEFTune's noise."""
    embeds = model.embed(jnp.asarray(batch["input_ids"]), lora)
    noise = neftune_noise(key, documents(batch), embeds.shape[-1], alpha or 0.0)
    return embeds + noise.astype(embeds.dtype)


def neftune_noise(
    key: PRNGKeyArray, segment_ids: Int[Array, "batch seq"], hidden: int, alpha: float
) -> Float[Array, "batch seq hidden"]:
    """Uniform noise in ±α/√(L·d), zero at padding (NEFTune, https://arxiv.org/abs/2310.05914).

    L is the number of tokens of the document that a token belongs to, as in the paper's code, where
    a row is a document; TRL and transformers take the padded length instead, which makes the noise
    depend on the batch's other rows.
    """
    length = token_counts(segment_ids)[..., None]  # [B, T, 1]
    noise = jax.random.uniform(key, (*segment_ids.shape, hidden), minval=-1.0, maxval=1.0)
    return jnp.where(segment_ids[..., None] != 0, noise * alpha / jnp.sqrt(length * hidden), 0)
