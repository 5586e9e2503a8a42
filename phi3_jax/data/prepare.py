"""From the data section of a run to tokenised rows with loss masks."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from phi3_jax.config.sections import EVAL, DataSection
from phi3_jax.data.cache import cached_rows
from phi3_jax.data.chat import ChatTokenizer
from phi3_jax.data.collected import Collected
from phi3_jax.data.memory import TRAIN, GivenRows, GivenSets, given_sets, given_source, with_given_rows
from phi3_jax.data.packing import Order, plan_epoch
from phi3_jax.data.pieces import pieces
from phi3_jax.data.row_arrays import from_arrays
from phi3_jax.data.row_key import RowKeys
from phi3_jax.data.row_tokenizer import Row, RowTokenizer, add_notices
from phi3_jax.data.rows import DataStats, TokenizedRows, length_figures, length_histogram
from phi3_jax.data.shares import LEAST_SHARED, all_counts, all_of, made_together, own_share
from phi3_jax.data.sources import Source, load_sources
from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.parallel.distributed import check_agreement, together
from phi3_jax.system.compat_jax import distributed_state
from phi3_jax.system.errors import InputError
from phi3_jax.system.telling import watched
from phi3_jax.system.text import counted


@dataclass(frozen=True)
class PreparedData:
    """Training rows, evaluation rows if the run has any, and what the user should know of both.

    Attributes:
        train: The training rows.
        eval_sets: The sets of evaluation rows, by what stands in front of the names of their figures: `eval`, or
            `eval_NAME` where they have names. Empty where the run has none.
        note: Why it has none, where that may surprise.
    """

    train: TokenizedRows
    eval_sets: Mapping[str, TokenizedRows]
    note: str | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest training row, as it is used."""
        return int(self.train.lengths.max())

    @property
    def stats(self) -> dict[str, dict[str, object]]:
        """`DataStats` of each, as JSON-able dictionaries."""
        return {name: rows.stats.to_dict() for name, rows in self.sets.items()}

    @property
    def sets(self) -> dict[str, TokenizedRows]:
        """All of them by name, the training rows first."""
        return {"train": self.train, **self.eval_sets}

    def summary(self) -> str:
        """A few lines for the console."""
        lines = [rows.stats.summary(name) for name, rows in self.sets.items()]
        return "\n".join(lines if self.note is None else [*lines, self.note])


def prepare_data(
    data: DataSection,
    tokenizer: Tokenizer,
    *,
    seed: int,
    train: GivenRows | None = None,
    eval: GivenSets | None = None,
) -> PreparedData:
    """Reads, renders and tokenises the rows of a run.

    Args:
        data: What to read, and how.
        tokenizer: The checkpoint's, from transformers, with a fast (Rust) implementation.
        seed: Draws the rows of `eval_fraction`; the same ones as
            `datasets.Dataset.train_test_split(eval_fraction, seed=seed)`.
        train: The training rows, where they are in memory: a `datasets.Dataset` or `IterableDataset`, dictionaries in a
            list or from a generator, or a function that makes one. Then `data.train` is not set.
        eval: The same for evaluation, or several of them by name.

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
        raise InputError(
            "data.eval_fraction is set beside data.eval or data.eval_split; keep one of them (--data.eval_fraction 0 "
            "holds no rows out)"
        )
    data = with_given_rows(data, train, eval)
    chat = ChatTokenizer.of_section(tokenizer, data)
    keys = RowKeys(tokenizer, data)
    with together():
        train_rows, eval_rows, note = _read(data, train, eval, chat, seed)
    return PreparedData(
        prepare_rows(train_rows, chat, keys, data, seed=seed),
        prepare_sets(eval_rows, chat, tokenizer, data, seed=seed),
        note,
    )


def prepare_sets(
    sets: Mapping[str, Sequence[Row]], chat: ChatTokenizer, tokenizer: Tokenizer, data: DataSection, *, seed: int
) -> dict[str, TokenizedRows]:
    """`prepare_rows` of each set to evaluate on."""
    data = data.evaluation
    keys = RowKeys(tokenizer, data)
    return {name: prepare_rows(rows, chat, keys, data, seed=seed) for name, rows in sets.items()}


def _read(
    data: DataSection, train: GivenRows | None, eval: GivenSets | None, chat: ChatTokenizer, seed: int
) -> tuple[list[Row], dict[str, list[Row]], str | None]:
    """The training rows, the evaluation rows, and why there are none of these where that may surprise."""
    if train is None:
        sources = load_sources(data.require_train(), split=data.split, dataset_config=data.dataset_config)
    else:
        sources = [given_source(train, TRAIN)]
    rows = _rows(sources, data)
    if data.eval_fraction > 0:
        rows, held_out = _split(rows, data, chat, seed)
        return rows, {EVAL: held_out}, None
    return rows, *evaluation_rows(data, eval, [source.name for source in sources])


def evaluation_rows(
    data: DataSection, given: GivenSets | None, train_names: Sequence[str]
) -> tuple[dict[str, list[Row]], str | None]:
    """The rows of `data.eval` or `data.eval_split`, or those that are given in memory.

    Args:
        data: Says where they are.
        given: In their place.
        train_names: Of the sources that are trained on.

    Returns:
        The sets as `PreparedData.eval_sets`, none where there is nothing to evaluate, and why there are none where that
        may surprise.
    """
    if given is not None:
        return {name: _rows([given_source(rows, said)], data) for name, (said, rows) in given_sets(given).items()}, None
    sets = {}
    for name, path in data.eval_sources.items():
        sources = load_sources(path or data.require_train(), split=data.eval_split, dataset_config=data.dataset_config)
        if path is None and [source.name for source in sources] == list(train_names):
            # A recipe's split of a hub dataset, and the user's own file in that dataset's place.
            return {}, (
                f"no evaluation: {data.train} has no split {data.eval_split}; give data.eval, or data.eval_fraction "
                "with data.eval_split null"
            )
        sets[name] = _rows(sources, data)
    return sets, None


def prepare_rows(
    rows: Sequence[Row], chat: ChatTokenizer, keys: RowKeys, data: DataSection, *, seed: int
) -> TokenizedRows:
    """`tokenize_rows`, from where they are kept, or by this process, or by several together."""
    key = cache(lambda: keys(rows))
    shared = False
    if distributed_state().num_processes > 1:
        check_agreement({"rows and what they depend on": str(key()), "number of rows": str(len(rows))})
        # What cannot be compared is not put together either.
        shared = len(rows) >= LEAST_SHARED and key() is not None

    def make() -> TokenizedRows:
        return tokenize_rows(rows, chat, data, seed=seed, shared=shared)

    found = pieces(cached_rows(key, make) if data.cache else make(), data)
    found.stats.target_tokens = int(found.loss_mask.sum(dtype=np.int64))
    count_positions(found, data, seed)
    return found


def _rows(sources: Sequence[Source], data: DataSection) -> list[Row]:
    rows = [Row(source, index) for source in sources for index in range(len(source.rows))][: data.max_rows]
    if not rows:
        raise InputError(f"{', '.join(source.name for source in sources)}: no usable rows; the data is empty")
    return rows


def _split(rows: list[Row], data: DataSection, chat: ChatTokenizer, seed: int) -> tuple[list[Row], list[Row]]:
    count = math.ceil(data.eval_fraction * len(rows))
    if count == len(rows):
        tokenize_rows(rows, chat, data, seed=seed)  # a row's own fault is the one to tell
        raise InputError(
            f"{data.train}: {counted(len(rows), 'row')} leave{'s' if len(rows) == 1 else ''} nothing to train on with "
            f"data.eval_fraction {data.eval_fraction}"
        )
    drawn = np.random.default_rng(seed).permutation(len(rows))[:count]
    held_out = set(drawn.tolist())
    return (
        [row for index, row in enumerate(rows) if index not in held_out],
        [row for index, row in enumerate(rows) if index in held_out],
    )


def tokenize_rows(
    rows: Sequence[Row], chat: ChatTokenizer, data: DataSection, *, seed: int, shared: bool = False
) -> TokenizedRows:
    """Renders and tokenises rows, and marks their targets.

    Args:
        rows: What there is.
        chat: Renders.
        data: How rows are read, cut and trained on.
        seed: Of the order of packing.
        shared: Whether several processes share the work; all take part, with the same rows.

    Raises:
        InputError: As of `RowTokenizer`, and where no row is left.
    """
    stats = DataStats(sources=list(dict.fromkeys(row.source.name for row in rows)))
    found = Collected(stats.sources)
    share = own_share(rows) if shared else rows

    def render() -> None:
        with watched("rendering", len(share)) as advance:
            for row in RowTokenizer(chat, data, stats)(_counted(share, advance)):
                found.add(row)

    if shared:
        made_together(render)
        arrays, stats = all_of(found.arrays()), all_counts(stats)
    else:
        render()
        arrays = found.arrays()
    lengths = arrays.pop("lengths")
    if not len(lengths):
        where, why = stats.left_out[0]
        faults = "are invalid or " if stats.invalid else ""
        raise InputError(
            f"{', '.join(stats.sources)}: no usable rows; all {len(rows)} {faults}have nothing to train on "
            f"({where}: {why})"
        )
    tokenized = from_arrays(arrays, stats, stats.sources)
    stats.rows, stats.tokens = len(tokenized), int(tokenized.offsets[-1])
    stats.target_tokens = int(tokenized.loss_mask.sum(dtype=np.int64))
    stats.lengths, stats.length_figures = (
        length_histogram(lengths, data.max_length if data.cuts else None),
        length_figures(lengths),
    )
    add_notices(stats, chat, data)
    return tokenized


def _counted(rows: Iterable[Row], advance: Callable[[int], None]) -> Iterator[Row]:
    for row in rows:
        yield row
        advance(1)


def count_positions(rows: TokenizedRows, data: DataSection, seed: int) -> None:
    """Looks how full packed sequences are, for the statistics."""
    rows.stats.packing_efficiency = None
    if data.packing:
        sequences = len(plan_epoch(rows, data, Order(seed), 0))
        rows.stats.packing_efficiency = rows.stats.tokens / (sequences * data.limit)
