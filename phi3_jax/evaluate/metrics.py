"""What an evaluation measures: token figures, and ways to hold an answer against its reference.

Text metrics are their reference libraries': ROUGE is rouge-score's, BLEU and chrF are sacrebleu's, JSON
Schema is jsonschema's. They are installed with the extra `eval`.
"""

import importlib
import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from phi3_jax.config.names import nearest
from phi3_jax.report.statistics import Statistic, mean
from phi3_jax.system.errors import InputError

Scores = dict[str, float]  # of one row


@dataclass(frozen=True)
class Row:
    """An evaluated row. **Fields**: `answer`, the model's; `reference`, the data's; `scores`, its metrics'."""

    answer: str
    reference: str
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Figure:
    """A number about a set of rows.

    **Fields**: `form`, how it is written; `statistic`, what makes it of the sums of the rows' columns.
    """

    name: str
    form: str = "{:.1%}"
    statistic: Statistic = mean
    less_is_better: bool = False


class Metric:
    """A way to judge rows: one figure, the mean of a score of each answer, unless a subclass says otherwise.

    **Fields**: `figures`, what it tells about a set of rows; `needs_answers`, whether the model has to answer.
    """

    figures: tuple[Figure, ...]
    needs_answers = True

    def prepare(self, references: Sequence[str]) -> None:
        """Looks at all rows' references; raises `InputError` for one that the metric cannot use."""

    def score(self, answer: str, reference: str) -> Scores:
        """What the metric says of a single row, by name; of a metric of the set alone nothing."""
        del answer, reference
        return {}

    def columns(self, rows: Sequence[Row]) -> dict[str, Float[ndarray, "rows columns"]]:
        """For each figure what its statistic takes the sums of."""
        names = [figure.name for figure in self.figures]
        return {name: np.array([[row.scores[name], 1.0] for row in rows]) for name in names}


class TokenLoss(Metric):
    """Loss, perplexity and accuracy over all target tokens, of the model's own predictions, not its answers."""

    needs_answers = False

    def __init__(self) -> None:
        self.figures = (
            Figure("loss", "{:.4f}", less_is_better=True),
            Figure("perplexity", "{:,.5g}", _perplexity, less_is_better=True),
            Figure("token_accuracy"),
        )

    @staticmethod
    def of_sums(loss: float, target_tokens: int, right_tokens: int) -> Scores:
        """A row's scores, of its sums over target tokens."""
        return {"loss": loss / target_tokens, "target_tokens": target_tokens, "right_tokens": right_tokens}

    def columns(self, rows: Sequence[Row]) -> dict[str, Float[ndarray, "rows columns"]]:
        tokens = np.array([row.scores["target_tokens"] for row in rows], np.float64)
        losses = tokens * np.array([row.scores["loss"] for row in rows])
        right = np.array([row.scores["right_tokens"] for row in rows], np.float64)
        loss = np.stack([losses, tokens], axis=1)
        return {"loss": loss, "perplexity": loss, "token_accuracy": np.stack([right, tokens], axis=1)}


def _perplexity(sums: Float[ndarray, "samples 2"]) -> Float[ndarray, "samples"]:
    return np.exp(np.minimum(mean(sums), 700.0))  # e**700 is near what a float holds


class Rouge(Metric):
    """ROUGE-1, 2, L and Lsum: F-measure with Porter's stemmer; Lsum takes lines for sentences."""

    def __init__(self) -> None:
        names = ("rouge1", "rouge2", "rougeL", "rougeLsum")
        self.figures = tuple(Figure(name, "{:.4f}") for name in names)
        self._scorer = _library("rouge_score.rouge_scorer", "rouge").RougeScorer(names, use_stemmer=True)

    def score(self, answer: str, reference: str) -> Scores:
        return {name: score.fmeasure for name, score in self._scorer.score(reference, answer).items()}


class SacreBleu(Metric):
    """BLEU or chrF of the whole set, in sacrebleu's default settings.

    Its rows' statistics are n-gram counts, which sacrebleu sums for its own significance tests in the
    same way.
    """

    def __init__(self, name: str) -> None:
        metrics = _library("sacrebleu.metrics", name)
        self._scorer = {"bleu": metrics.BLEU, "chrf": metrics.CHRF}[name]()
        self.figures = (Figure(name, "{:.2f}", self._of_sums),)

    def columns(self, rows: Sequence[Row]) -> dict[str, Float[ndarray, "rows columns"]]:
        answers, references = [row.answer for row in rows], [row.reference for row in rows]
        counts = self._scorer._extract_corpus_statistics(answers, [references])
        return {self.figures[0].name: np.array(counts, np.float64)}

    def _of_sums(self, sums: Float[ndarray, "samples counts"]) -> Float[ndarray, "samples"]:
        whole = np.rint(sums).astype(np.int64).tolist()
        return np.array([self._scorer._compute_score_from_stats(row).score for row in whole])


class ExactMatch(Metric):
    """Share of answers that are the reference, surrounding space left out."""

    def __init__(self) -> None:
        self.figures = (Figure("exact_match"),)

    def score(self, answer: str, reference: str) -> Scores:
        return {"exact_match": float(answer.strip() == reference.strip())}


class NormalizedMatch(Metric):
    """Exact match after SQuAD's normalisation: lower case, no punctuation, no articles, single blanks."""

    def __init__(self) -> None:
        self.figures = (Figure("normalized_match"),)

    def score(self, answer: str, reference: str) -> Scores:
        return {"normalized_match": float(_squad(answer) == _squad(reference))}


def _squad(text: str) -> str:
    letters = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", letters).split())


class _Labels(Metric):
    """Answers as labels, of those that the references have.

    An answer is a label if it is written so, surrounding space left out; or else if it becomes so
    regardless of case and without a full stop at its end, and no other label does too.
    """

    def prepare(self, references: Sequence[str]) -> None:
        self._labels = sorted({reference.strip() for reference in references})
        self._folded: dict[str, str | None] = {}
        for label in self._labels:
            folded = _fold(label)
            self._folded[folded] = None if folded in self._folded else label

    def label(self, answer: str) -> str | None:
        """The label that an answer is, None where it is none."""
        answer = answer.strip()
        return answer if answer in self._labels else self._folded.get(_fold(answer))


def _fold(label: str) -> str:
    return label.strip().removesuffix(".").rstrip().casefold()


class Accuracy(_Labels):
    """Share of answers with the right label; one that is no label is wrong."""

    def __init__(self) -> None:
        self.figures = (Figure("accuracy"),)

    def score(self, answer: str, reference: str) -> Scores:
        return {"accuracy": float(self.label(answer) == reference.strip())}


class MacroF1(_Labels):
    """The labels' F1, each weighing the same: the mean of 2·tp / (2·tp + fp + fn) over the references' labels.

    As `sklearn.metrics.f1_score(references, answers, labels=sorted(set(references)), average="macro")`. An
    answer that is no label is a false negative of the right one. In a resample the labels are those that
    its references have.
    """

    def __init__(self) -> None:
        self.figures = (Figure("macro_f1", "{:.4f}", _macro_f1),)

    def columns(self, rows: Sequence[Row]) -> dict[str, Float[ndarray, "rows columns"]]:
        labels = np.array(self._labels)
        answers = np.array([self.label(row.answer) or "" for row in rows])[:, None] == labels
        references = np.array([row.reference.strip() for row in rows])[:, None] == labels
        counts = np.stack([answers & references, answers, references], axis=-1)  # [rows, labels, 3]
        return {"macro_f1": counts.reshape(len(rows), -1).astype(np.float64)}


def _macro_f1(sums: Float[ndarray, "samples counts"]) -> Float[ndarray, "samples"]:
    right, answered, referred = np.moveaxis(sums.reshape(len(sums), -1, 3), -1, 0)
    f1 = 2 * right / np.maximum(answered + referred, 1)
    return np.sum(f1, axis=1, where=referred > 0) / np.sum(referred > 0, axis=1)


# A number as people write it: sign, dollars, thousands parted by commas, decimals. A minus after a word,
# a number or a bracket is a subtraction or a hyphen.
_NUMBER = re.compile(r"(?:(?<![\w)\]])-\$?|\$-?|)(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)(?:\.\d+)?|(?:(?<![\w)\]])-)?\.\d+")


class NumericMatch(Metric):
    """Share of answers whose final number is the reference's, as for GSM8K.

    The final number stands after `####`, where there is one with a number, and otherwise is the last
    of the text; it is compared by value: `$1,000.00` is 1000.
    """

    def __init__(self) -> None:
        self.figures = (Figure("numeric_match"),)

    def prepare(self, references: Sequence[str]) -> None:
        for index, reference in enumerate(references):
            if final_number(reference) is None:
                raise InputError(
                    f"metric gsm8k: the reference of row {index + 1} holds no number; give rows that end as "
                    "'#### 72', or leave the metric out"
                )

    def score(self, answer: str, reference: str) -> Scores:
        return {"numeric_match": float(final_number(answer) == final_number(reference))}


def final_number(text: str) -> Decimal | None:
    """The number that an answer arrives at, None where it holds none."""
    text = text.replace("\N{MINUS SIGN}", "-")
    marked = _NUMBER.search(text.rpartition("####")[2]) if "####" in text else None
    found = marked.group() if marked else next(reversed(_NUMBER.findall(text)), None)
    return None if found is None else Decimal(re.sub("[$,]", "", found))


class RegexMatch(Metric):
    """Share of answers in which Python's `re.search` finds the pattern."""

    def __init__(self, pattern: str) -> None:
        self.figures = (Figure("regex_match"),)
        try:
            self._pattern = re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"metric regex: {pattern!r} is no regular expression ({error}); mend it") from error

    def score(self, answer: str, reference: str) -> Scores:
        del reference
        return {"regex_match": float(self._pattern.search(answer) is not None)}


_FENCE = re.compile(r"```(?:json|JSON)?[ \t]*\n(.*)\n[ \t]*```", re.DOTALL)


class JsonSchema(Metric):
    """Share of answers that are JSON, bare or in a ```json fence, and valid by a JSON Schema.

    References that lead out of the schema are not followed: nothing is fetched.
    """

    def __init__(self, file: str) -> None:
        self.figures = (Figure("json_schema"),)
        jsonschema = _library("jsonschema", "json_schema")
        registry = _library("referencing", "json_schema").Registry()
        self._unresolvable = _library("referencing.exceptions", "json_schema").Unresolvable
        self._file = file
        try:
            schema = json.loads(Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"metric json_schema: {file} cannot be read ({error.strerror}); check the path") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"metric json_schema: {file} is not JSON ({error}); mend it") from error
        if not isinstance(schema, dict | bool):
            raise InputError(f"metric json_schema: {file} is no JSON Schema (a {type(schema).__name__}); mend it")
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        try:
            kind.check_schema(schema)
        except jsonschema.SchemaError as error:
            raise InputError(f"metric json_schema: {file} is no JSON Schema ({error.message}); mend it") from error
        self._validator = kind(schema, registry=registry)

    def score(self, answer: str, reference: str) -> Scores:
        del reference
        fenced = _FENCE.fullmatch(answer.strip())
        try:
            value = json.loads(fenced[1] if fenced else answer, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return {"json_schema": 0.0}
        try:
            return {"json_schema": float(self._validator.is_valid(value))}
        except self._unresolvable as error:
            raise InputError(
                f"metric json_schema: {self._file} refers to {error.ref}, which is not in it; put it under $defs"
            ) from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")  # NaN and Infinity, which Python's parser takes


PLAIN: dict[str, Callable[[], Metric]] = {
    "loss": TokenLoss,
    "rouge": Rouge,
    "bleu": lambda: SacreBleu("bleu"),
    "chrf": lambda: SacreBleu("chrf"),
    "exact_match": ExactMatch,
    "normalized_match": NormalizedMatch,
    "accuracy": Accuracy,
    "f1": MacroF1,
    "gsm8k": NumericMatch,
}
WITH_VALUE: dict[str, tuple[Callable[[str], Metric], str]] = {
    "regex": (RegexMatch, "PATTERN"),
    "json_schema": (JsonSchema, "FILE"),
}
NAMES = (*PLAIN, *(f"{name}={value}" for name, (_, value) in WITH_VALUE.items()))


def split_metrics(text: str) -> list[str]:
    """The metrics of an option: parted by commas, but `regex=` and `json_schema=` have the rest to themselves."""
    specs: list[str] = []
    while text:
        if text.partition("=")[0].strip() in WITH_VALUE:
            return [*specs, text.strip()]
        spec, _, text = text.partition(",")
        specs.append(spec.strip())
    return specs


def make_metrics(specs: Sequence[str]) -> dict[str, Metric]:
    """The metrics of specifications such as `rouge` and `regex=PATTERN`, by name, in their order.

    Raises `InputError` for an unknown or repeated name, a missing or needless value, what is wrong
    with the value, and a library that is not installed.
    """
    metrics: dict[str, Metric] = {}
    for spec in specs:
        name, equals, value = spec.partition("=")
        if name in metrics:
            raise InputError(f"metric {name} is given twice; leave one out")
        if name in WITH_VALUE:
            make, kind = WITH_VALUE[name]
            if not value:
                raise InputError(f"metric {name} needs a value; give {name}={kind}")
            metrics[name] = make(value)
        elif name in PLAIN:
            if equals:
                raise InputError(f"metric {name} takes no value, found {spec!r}; give {name}")
            metrics[name] = PLAIN[name]()
        else:
            near = nearest(name, [*PLAIN, *WITH_VALUE])
            raise InputError(f"unknown metric {name!r}; did you mean {near}? There are {', '.join(NAMES)}")
    if not metrics:
        raise InputError(f"no metric is given; give some of {', '.join(NAMES)}")
    return metrics


def _library(module: str, metric: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = {"rouge_score": "rouge-score"}.get(module.partition(".")[0], module.partition(".")[0])
        raise InputError(
            f"metric {metric} needs {name}, which is not installed; pip install 'phi3_jax[eval]'"
        ) from error
