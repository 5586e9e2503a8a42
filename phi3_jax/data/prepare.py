"""From the data section of a run to tokenised rows with loss masks."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from phi3_jax.config.sections import DataSection
from phi3_jax.data.chat import ChatTokenizer, Encoded, Rendered
from phi3_jax.data.formats import Conversation, Prerendered, read_row
from phi3_jax.data.packing import plan_epoch
from phi3_jax.data.rows import DataStats, Origins, TokenizedRows, length_histogram
from phi3_jax.data.sources import Source, load_sources
from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.system.errors import InputError

# Rows and characters tokenised in one call: enough to keep every core busy, little memory.
_CHUNK, _CHUNK_TEXT = 1000, 2**23


@dataclass(frozen=True)
class PreparedData:
    """Training rows, evaluation rows if the run has any, and what the user should know of both.

    Attributes:
        train: The training rows.
        eval: The evaluation rows; None where the run has none.
        note: Why it has none, where that may surprise.
    """

    train: TokenizedRows
    eval: TokenizedRows | None
    note: str | None = None

    @property
    def stats(self) -> dict[str, dict[str, object]]:
        """`DataStats` of each, as JSON-able dictionaries."""
        parts = {"train": self.train, "eval": self.eval}
        return {name: rows.stats.to_dict() for name, rows in parts.items() if rows is not None}

    def summary(self) -> str:
        """A few lines for the console."""
        lines = [rows.stats.summary(name) for name, rows in (("train", self.train), ("eval", self.eval)) if rows]
        return "\n".join(lines if self.note is None else [*lines, self.note])


def prepare_data(data: DataSection, tokenizer: Tokenizer, *, seed: int) -> PreparedData:
    """Reads, renders and tokenises the rows of a run.

    Args:
        data: What to read, and how.
        tokenizer: The checkpoint's, from transformers, with a fast (Rust) implementation.
        seed: Draws the rows of `eval_fraction`; the same ones as
            `datasets.Dataset.train_test_split(eval_fraction, seed=seed)`.

    Raises:
        InputError: For anything wrong with the section, the files or a row; see the modules `sources`, `formats` and
            `chat`.

    Example:
        >>> import json
        >>> from pathlib import Path
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "</s>": 3}, unk_token="a"))
        >>> backend.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
        >>> _ = Path("chats.jsonl").write_text(json.dumps({"prompt": "a b", "completion": "c"}))
        >>> prepared = prepare_data(DataSection(train="chats.jsonl", max_length=16), tokenizer, seed=0)
        >>> ids, loss_mask = prepared.train[0]
        >>> ids.tolist(), loss_mask.tolist()  # the answer and the token that ends it are trained on
        ([0, 1, 2, 3], [0, 0, 1, 1])
    """
    if data.eval_fraction and (data.eval is not None or data.eval_split is not None):
        raise InputError("data.eval_fraction is set beside data.eval or data.eval_split; keep one of them")
    train_source = data.require_train()
    chat = ChatTokenizer(tokenizer)
    sources = load_sources(train_source, split=data.split, dataset_config=data.dataset_config)
    train = _rows(sources, data)
    held_out: list[_Row] = []
    note = None
    if data.eval is not None or data.eval_split is not None:
        eval_sources = load_sources(
            data.eval or train_source, split=data.eval_split, dataset_config=data.dataset_config
        )
        if data.eval is None and [s.name for s in eval_sources] == [s.name for s in sources]:
            # A recipe's split of a hub dataset, and the user's own file in that dataset's place.
            note = (
                f"no evaluation: {data.train} has no split {data.eval_split}; give data.eval, or data.eval_fraction "
                "with data.eval_split null"
            )
        else:
            held_out = _rows(eval_sources, data)
    elif data.eval_fraction > 0:
        train, held_out = _split(train, data, seed)
    return PreparedData(
        tokenize_rows(train, chat, data, seed=seed),
        tokenize_rows(held_out, chat, data, seed=seed) if held_out else None,
        note,
    )


@dataclass(frozen=True)
class _Row:
    source: Source
    index: int

    @property
    def where(self) -> str:
        return self.source.where(self.index)

    @property
    def columns(self) -> Mapping[str, object]:
        return self.source.rows[self.index]


def _rows(sources: Sequence[Source], data: DataSection) -> list[_Row]:
    rows = [_Row(source, index) for source in sources for index in range(len(source.rows))][: data.max_rows]
    if not rows:
        raise InputError(f"{', '.join(source.name for source in sources)}: no usable rows; the data is empty")
    return rows


def _split(rows: list[_Row], data: DataSection, seed: int) -> tuple[list[_Row], list[_Row]]:
    count = math.ceil(data.eval_fraction * len(rows))
    if count == len(rows):
        raise InputError(
            f"{data.train}: {len(rows)} row(s) leave nothing to train on with data.eval_fraction {data.eval_fraction}"
        )
    drawn = np.random.default_rng(seed).permutation(len(rows))[:count]
    held_out = set(drawn.tolist())
    return (
        [row for index, row in enumerate(rows) if index not in held_out],
        [row for index, row in enumerate(rows) if index in held_out],
    )


def tokenize_rows(rows: Sequence[_Row], chat: ChatTokenizer, data: DataSection, *, seed: int) -> TokenizedRows:
    """Renders and tokenises rows, and marks their targets.

    Raises:
        InputError: For the first row with nothing to train on unless `data.skip_empty`, and where no row is left.
    """
    stats = DataStats(sources=list(dict.fromkeys(row.source.name for row in rows)))
    ids, masks, lengths, prompt_lengths, references, origins = [], [], [], [], [], []
    for row, document, encoded in _encode(rows, chat, data, stats):
        stats.longest = max(stats.longest, len(encoded.ids))
        mask = target_mask(encoded, document, data.loss_on)
        kept = mask[: data.max_length]
        if not kept.any():
            beyond = f"all its targets lie beyond data.max_length {data.max_length}"
            _skip(document.where, beyond if mask.any() else _why_empty(document, chat), data, stats)
            continue
        stats.truncated += len(mask) > data.max_length
        stats.dropped_turns += document.dropped
        ids.append(encoded.ids[: data.max_length].copy())  # a view would keep the rest
        masks.append(kept.astype(np.uint8))
        lengths.append(len(mask))
        prompt_length = encoded.first(document.spans[-1]) if document.spans else 0
        prompt_lengths.append(prompt_length if prompt_length < data.max_length else 0)
        references.append(document.spans[-1].content if document.spans else "")
        origins.append((stats.sources.index(row.source.name), row.index))
    if not ids:
        raise InputError(f"{', '.join(stats.sources)}: no usable rows; all {len(rows)} have nothing to train on")
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])])
    stats.rows, stats.tokens = len(ids), int(offsets[-1])
    stats.target_tokens = int(sum(int(mask.sum()) for mask in masks))
    stats.lengths = length_histogram(lengths, data.max_length)
    _add_notices(stats, chat)
    if data.packing:
        bins = plan_epoch(np.diff(offsets), data, seed=seed, epoch=0)
        stats.packing_efficiency = stats.tokens / (len(bins) * data.max_length)
    source, index = np.array(origins).T
    return TokenizedRows(
        np.concatenate(ids),
        np.concatenate(masks),
        offsets,
        np.array(prompt_lengths, np.int32),
        references,
        stats,
        Origins(stats.sources, source.astype(np.int32), index.astype(np.int32)),
    )


def _encode(
    rows: Sequence[_Row], chat: ChatTokenizer, data: DataSection, stats: DataStats
) -> Iterator[tuple[_Row, Rendered, Encoded]]:
    chunk: list[tuple[_Row, Rendered]] = []
    length = 0

    def encoded() -> Iterator[tuple[_Row, Rendered, Encoded]]:
        found = chat.encode([document for _, document in chunk])
        return ((*part, tokens) for part, tokens in zip(chunk, found, strict=True))

    for row in rows:
        where = row.where
        example = read_row(row.columns, where, format=data.format, columns=data.columns)
        if isinstance(example, Conversation) and all(turn.role != "assistant" for turn in example.turns):
            _skip(where, "has no assistant turn", data, stats)
            continue
        if isinstance(example, Prerendered) and not example.text.strip():
            _skip(where, "its text is blank", data, stats)
            continue
        document = chat.render(example, where)
        if chunk and (len(chunk) == _CHUNK or length + len(document.text) > _CHUNK_TEXT):
            yield from encoded()
            chunk, length = [], 0
        chunk.append((row, document))
        length += len(document.text)
    yield from encoded()


def _skip(where: str, why: str, data: DataSection, stats: DataStats) -> None:
    if not data.skip_empty:
        raise InputError(f"{where}: {why}; mend the row, or leave such rows out with data.skip_empty: true")
    stats.skipped += 1


def _why_empty(document: Rendered, chat: ChatTokenizer) -> str:
    if not document.spans and document.is_prerendered:
        return (
            f"no assistant turn found in its text (looked for {chat.turn_markers}); "
            "set data.loss_on: all to train on the whole text"
        )
    if not document.spans:
        return "its assistant turns are blank"
    if not any(span.trained for span in document.spans):
        return "every assistant turn has loss weight 0"
    return "none of its tokens is a target"


def target_mask(encoded: Encoded, document: Rendered, loss_on: str) -> Bool[ndarray, "tokens"]:
    """Which tokens are trained on.

    `assistant`: the assistant's turns, each with the token that ends it; `last`: the last of them;
    `all`: everything. The first token of a document is predicted from nothing, and never a target.
    """
    if loss_on == "all":
        mask = np.ones(encoded.ids.shape, bool)
    else:
        mask = np.zeros(encoded.ids.shape, bool)
        for span in document.spans[-1:] if loss_on == "last" else document.spans:
            if span.trained:
                mask |= encoded.covered_by(span)
    mask[:1] = False
    return mask


def _add_notices(stats: DataStats, chat: ChatTokenizer) -> None:
    if stats.dropped_turns:
        stats.notices.append(
            f"the chat template has no place for system turns: {stats.dropped_turns:,} are not in the text trained on"
        )
    if not chat.ends_turns:
        stats.notices.append("no special token ends the assistant's turns: the model is not taught where to stop")
    if stats.truncated:
        stats.notices.append(f"{stats.truncated:,} rows lost their end; the longest has {stats.longest:,} tokens")
