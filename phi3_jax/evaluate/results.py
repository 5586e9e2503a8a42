"""What an evaluation has found: every figure with its interval, and its difference from the base's."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from rich.table import Table

from phi3_jax.config.names import BASE
from phi3_jax.evaluate.metric import Columns, Metric, Row
from phi3_jax.evaluate.predictions import Prediction
from phi3_jax.report.figures import Compared
from phi3_jax.report.forms import Form, form_of, p_value_text, words
from phi3_jax.report.statistics import Statistic, bootstrap_difference, bootstrap_interval, estimate, paired_test

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure of one model.

    Attributes:
        value: The figure.
        low: Where its 95% bootstrap interval begins.
        high: Where it ends.
        difference: From the base's figure; None, as all that follows, for the base itself or without one.
        difference_low: Where the difference's interval begins.
        difference_high: Where it ends.
        p_value: How likely so large a difference is by chance.
    """

    value: float
    low: float
    high: float
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p_value: float | None = None


@dataclass(frozen=True)
class Results:
    """What `evaluate` returns.

    Attributes:
        models: Model -> figure (`loss`, `rouge1`, ...) -> `Estimate`.
        predictions: Model -> its rows, in the order of the data.
        data: `DataStats.to_dict()` of the rows.
        figures: Their names, in order.
    """

    models: dict[str, dict[str, Estimate]]
    predictions: dict[str, list[Prediction]]
    data: Mapping[str, object]
    figures: tuple[str, ...]

    @classmethod
    def of(
        cls, metrics: Sequence[Metric], predictions: dict[str, list[Prediction]], data: Mapping[str, object]
    ) -> "Results":
        """The figures of all models; the first is the base if it is named so."""
        models: dict[str, dict[str, Estimate]] = {name: {} for name in predictions}
        for metric in metrics:
            columns = {name: metric.columns([_row(p) for p in rows]) for name, rows in predictions.items()}
            for figure in metric.figures:
                base = columns[BASE][figure.name] if BASE in columns else None
                for name in predictions:
                    compared = None if name == BASE else base
                    models[name][figure.name] = _estimate(figure.statistic, columns[name][figure.name], compared)
        return cls(models, predictions, data, tuple(figure.name for metric in metrics for figure in metric.figures))

    def to_dict(self) -> dict[str, object]:
        """Plain values, without the predictions."""
        models = {
            name: {figure: asdict(found) for figure, found in figures.items()} for name, figures in self.models.items()
        }
        return {"rows": self.data["rows"], "confidence": CONFIDENCE, "models": models, "data": self.data}

    def table(self) -> Table:
        """Figure by figure, a line for each model."""
        compares = BASE in self.models and len(self.models) > 1
        table = Table(title=f"{self.data['rows']:,} rows, {self.data['target_tokens']:,} target tokens")
        table.add_column("metric")
        table.add_column("model")
        headings = ["value", "95% interval", *(["minus base", "95% interval", "p"] if compares else [])]
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        for figure in self.figures:
            for number, (name, figures) in enumerate(self.models.items()):
                cells = _cells(form_of(figure), figures[figure])
                first = "" if number else words(figure)
                table.add_row(first, name, *cells[: len(headings)], end_section=number == len(self.models) - 1)
        return table

    def __str__(self) -> str:
        """The table, 120 columns wide."""
        from rich.console import Console

        console = Console(width=120)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def _row(prediction: Prediction) -> Row:
    return Row(prediction.answer or "", prediction.reference, prediction.scores)


def _estimate(statistic: Statistic, values: Columns, base: Columns | None) -> Estimate:
    value = estimate(values, statistic=statistic)
    low, high = bootstrap_interval(values, statistic=statistic, confidence=CONFIDENCE)
    if base is None:
        return Estimate(value, low, high)
    return Estimate(
        value,
        low,
        high,
        value - estimate(base, statistic=statistic),
        *bootstrap_difference(values, base, statistic=statistic, confidence=CONFIDENCE),
        paired_test(values, base, statistic=statistic),
    )


def _cells(form: Form, found: Estimate) -> list[str]:
    cells = [form.write(found.value), f"{form.write(found.low)} to {form.write(found.high)}"]
    if found.difference is None or found.difference_low is None or found.difference_high is None:
        return [*cells, "", "", ""]
    interval = f"{form.signed(found.difference_low)} to {form.signed(found.difference_high)}"
    p = "" if found.p_value is None else p_value_text(found.p_value)
    return [*cells, form.signed(found.difference), interval, p]


def report_rows(results: Results) -> list[Compared]:
    """The figures as `write_evaluation_report` takes them."""
    rows: list[Compared] = []
    for name in results.figures:
        found = [figures[name] for figures in results.models.values()]
        rows.append(
            {
                "name": name,
                "values": [each.value for each in found],
                "intervals": [(each.low, each.high) for each in found],
                "p_values": [each.p_value for each in found],
            }
        )
    return rows
