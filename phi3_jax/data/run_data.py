"""What a run trains and evaluates on: prepared before it starts, or streamed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from phi3_jax.config.sections import DataSection
from phi3_jax.data.chat import ChatTokenizer
from phi3_jax.data.memory import GivenRows, GivenSets, with_given_rows
from phi3_jax.data.pipeline import Batches, train_batches
from phi3_jax.data.prepare import PreparedData, evaluation_rows, prepare_data, prepare_sets
from phi3_jax.data.row_streams import open_stream
from phi3_jax.data.rows import TokenizedRows
from phi3_jax.data.streaming import StreamedBatches, StreamedRows
from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.data.vocabulary import check_row_ids, check_vocabulary
from phi3_jax.parallel.distributed import together


@dataclass(frozen=True)
class StreamedData:
    """What `PreparedData` is, where training rows are rendered while it trains.

    Attributes:
        train: The training rows.
        eval_sets: The sets of evaluation rows, as of `PreparedData`, which are prepared.
        note: Why it has none, where that may surprise.
    """

    train: StreamedRows
    eval_sets: Mapping[str, TokenizedRows]
    note: str | None = None

    @property
    def longest(self) -> int:
        """Tokens that a training row can have: nobody knows those that are still to come."""
        return self.train.max_length

    @property
    def stats(self) -> dict[str, dict[str, object]]:
        """`DataStats` of each, as JSON-able dictionaries; of training rows, those that have been trained on."""
        parts = {"train": self.train.stats, **{name: rows.stats for name, rows in self.eval_sets.items()}}
        return {name: stats.to_dict() for name, stats in parts.items()}

    def summary(self) -> str:
        """A few lines for the console."""
        lines = [self.train.summary(), *(rows.stats.summary(name) for name, rows in self.eval_sets.items())]
        return "\n".join(lines if self.note is None else [*lines, self.note])


RunData = PreparedData | StreamedData


def load_data(
    data: DataSection,
    tokenizer: Tokenizer,
    *,
    seed: int,
    train: GivenRows | None = None,
    eval: GivenSets | None = None,
    table_rows: int | None = None,
) -> RunData:
    """`prepare_data`, or where `data.streaming` is true only what must be done before training.

    Args:
        data: As for `prepare_data`, as are `tokenizer`, `seed`, `train` and `eval`.
        tokenizer: The checkpoint's.
        seed: Draws the rows of `eval_fraction`.
        train: Training rows in memory.
        eval: Evaluation rows in memory.
        table_rows: Of the model's embedding, where it is known: no token may be beyond it.

    Raises:
        InputError: As `prepare_data` and `check_vocabulary` do; for streamed rows, where one of the first is wrong.

    Example:
        >>> from pathlib import Path
        >>> from phi3_jax.hf.tokenizer import load_tokenizer
        >>> import phi3_jax
        >>> tokenizer = load_tokenizer(Path(phi3_jax.__file__).parent / "demo" / "base")
        >>> data = DataSection(streaming=True, packing=False, max_length=64)
        >>> rows = [{"prompt": "2 teas", "completion": f"tea x{n}"} for n in range(5)]
        >>> loaded = load_data(data, tokenizer, seed=0, train=rows)
        >>> batches = loaded.train.batches(batch_size=2, accumulation=1, seed=0, pad_id=0)
        >>> next(batches)["input_ids"].shape, loaded.train.stats.rows
        ((1, 2, 64), 2)
        >>> batches.close()
    """
    if not data.streaming:
        prepared = prepare_data(data, tokenizer, seed=seed, train=train, eval=eval)
        if table_rows is not None:
            check_vocabulary(list(prepared.sets.values()), tokenizer, table_rows)
        return prepared
    data = with_given_rows(data, train, eval)
    chat = ChatTokenizer.of_section(tokenizer, data)
    with together():
        stream = open_stream(data, train)
        found, note = evaluation_rows(data, eval, stream.names)
        streamed = StreamedRows(stream, chat, data)
    held_out = prepare_sets(found, chat, tokenizer, data, seed=seed)
    if table_rows is not None:
        check_vocabulary([streamed.first, *held_out.values()], tokenizer, table_rows)
        streamed.check = partial(check_row_ids, table_rows=table_rows, tokenizer=tokenizer)
    return StreamedData(streamed, held_out, note)


def run_batches(
    rows: TokenizedRows | StreamedRows,
    data: DataSection,
    *,
    batch_size: int,
    accumulation: int,
    epochs: int | None,
    seed: int,
    pad_id: int,
    part: Sequence[int] | None = None,
    group_by_length: bool = False,
    drop_last: bool = False,
) -> Batches | StreamedBatches:
    """`train_batches` of rows of either kind; streamed ones know their section, and are neither grouped nor dropped."""
    if isinstance(rows, StreamedRows):
        return rows.batches(
            batch_size=batch_size, accumulation=accumulation, epochs=epochs, seed=seed, pad_id=pad_id, part=part
        )
    return train_batches(
        rows,
        data,
        batch_size=batch_size,
        accumulation=accumulation,
        epochs=epochs,
        seed=seed,
        pad_id=pad_id,
        part=part,
        group_by_length=group_by_length,
        drop_last=drop_last,
    )


def first_rows(rows: TokenizedRows | StreamedRows) -> TokenizedRows:
    """Rows to be shown before training."""
    return rows.first if isinstance(rows, StreamedRows) else rows
