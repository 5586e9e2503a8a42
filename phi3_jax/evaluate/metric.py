"""What a metric of an evaluation is: scores of each row, and figures of a set of rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from phi3_jax.report.statistics import Statistic, mean

Scores = dict[str, float]  # of one row
Columns = Float[ndarray, "rows columns"]


@dataclass(frozen=True)
class Row:
    """An evaluated row.

    Attributes:
        answer: The model's.
        reference: The data's.
        scores: Its metrics', by name.
    """

    answer: str
    reference: str
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Figure:
    """A number about a set of rows; how it is written, `phi3_jax.report.forms` says.

    Attributes:
        name: What it is called.
        statistic: What makes it of the sums of the rows' columns.
    """

    name: str
    statistic: Statistic = mean


class Metric:
    """A way to judge rows: the mean of a score of each answer for each figure, unless a subclass says otherwise.

    Attributes:
        figures: What it tells about a set of rows.
        needs_answers: Whether the model has to answer.
        notice: What the user should know of the references, once they are prepared.
    """

    figures: tuple[Figure, ...]
    needs_answers = True
    notice: str | None = None

    def prepare(self, references: Sequence[str]) -> None:
        """Looks at all rows' references.

        Raises:
            InputError: The metric cannot use one of them.
        """

    def score(self, answer: str, reference: str) -> Scores:
        """What the metric says of a single row, by name; of a metric of the set alone nothing."""
        del answer, reference
        return {}

    def columns(self, rows: Sequence[Row]) -> dict[str, Columns]:
        """For each figure what its statistic takes the sums of."""
        names = [figure.name for figure in self.figures]
        return {name: np.array([[row.scores[name], 1.0] for row in rows]) for name in names}


class Share(Metric):
    """The share of answers that are right.

    Args:
        name: The figure's.
        is_right: Whether an answer is, by its reference.
    """

    def __init__(self, name: str, is_right: Callable[[str, str], bool]) -> None:
        self.figures = (Figure(name),)
        self._is_right = is_right

    def score(self, answer: str, reference: str) -> Scores:
        """1 for a right answer, 0 for a wrong one."""
        return {self.figures[0].name: float(self._is_right(answer, reference))}
