"""The metrics of an evaluation by name: token figures, and ways to hold an answer against its reference.

Text metrics are their reference libraries': ROUGE is rouge-score's, BLEU and chrF are sacrebleu's, JSON
Schema is jsonschema's. They are installed with the extra `eval`.
"""

import importlib
import json
import re
import string
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from phi3_jax.config.names import did_you_mean
from phi3_jax.evaluate.metric import Columns, Figure, Metric, Row, Scores, Share
from phi3_jax.evaluate.tool_calls import ToolCalls
from phi3_jax.report.statistics import mean
from phi3_jax.system.compat import SetScorer, ngram_counts, score_of_counts
from phi3_jax.system.errors import InputError


def _perplexity(sums: Float[ndarray, "samples 2"]) -> Float[ndarray, "samples"]:
    values: Float[ndarray, "samples"] = np.exp(np.minimum(mean(sums), 700.0))  # e**700 is near what a float holds
    return values


class TokenLoss(Metric):
    """Loss, perplexity and accuracy over all target tokens, of the model's own predictions, not its answers."""

    needs_answers = False

    figures = (Figure("loss"), Figure("perplexity", _perplexity), Figure("token_accuracy"))

    @staticmethod
    def of_sums(loss: float, target_tokens: int, right_tokens: int) -> Scores:
        """A row's scores, of its sums over target tokens."""
        return {"loss": loss / target_tokens, "target_tokens": target_tokens, "right_tokens": right_tokens}

    def columns(self, rows: Sequence[Row]) -> dict[str, Columns]:
        """Sums over target tokens, and their number."""
        tokens = np.array([row.scores["target_tokens"] for row in rows], np.float64)
        losses = tokens * np.array([row.scores["loss"] for row in rows])
        right = np.array([row.scores["right_tokens"] for row in rows], np.float64)
        loss = np.stack([losses, tokens], axis=1)
        return {"loss": loss, "perplexity": loss, "token_accuracy": np.stack([right, tokens], axis=1)}


class Rouge(Metric):
    """ROUGE-1, 2, L and Lsum: F-measure with Porter's stemmer; Lsum takes lines for sentences."""

    def __init__(self) -> None:
        names = ("rouge1", "rouge2", "rougeL", "rougeLsum")
        self.figures = tuple(Figure(name) for name in names)
        self._scorer = _library("rouge_score.rouge_scorer", "rouge").RougeScorer(names, use_stemmer=True)

    def score(self, answer: str, reference: str) -> Scores:
        """The four F-measures."""
        return {name: score.fmeasure for name, score in self._scorer.score(reference, answer).items()}


class SacreBleu(Metric):
    """BLEU or chrF of the whole set, in sacrebleu's default settings, from n-gram counts of its rows."""

    def __init__(self, name: str) -> None:
        metrics = _library("sacrebleu.metrics", name)
        self._scorer: SetScorer = {"bleu": metrics.BLEU, "chrf": metrics.CHRF}[name]()
        self.figures = (Figure(name, self._of_sums),)

    def columns(self, rows: Sequence[Row]) -> dict[str, Columns]:
        """The n-gram counts."""
        counts = ngram_counts(self._scorer, [row.answer for row in rows], [row.reference for row in rows])
        return {self.figures[0].name: np.array(counts, np.float64)}

    def _of_sums(self, sums: Float[ndarray, "samples counts"]) -> Float[ndarray, "samples"]:
        return np.array([score_of_counts(self._scorer, row) for row in np.rint(sums).astype(np.int64).tolist()])


def same(answer: str, reference: str) -> bool:
    """Whether the answer is the reference, surrounding space left out."""
    return answer.strip() == reference.strip()


def same_normalized(answer: str, reference: str) -> bool:
    """The same after SQuAD's normalisation: lower case, no punctuation, no articles, single blanks."""
    return _squad(answer) == _squad(reference)


def _squad(text: str) -> str:
    letters = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", letters).split())


class _Labels(Metric):
    """Answers as labels, of those that the references have.

    An answer is a label if it is written so, surrounding space left out; or else if it becomes so
    regardless of case and without a full stop at its end, and no other label does too.
    """

    def prepare(self, references: Sequence[str]) -> None:
        """Learns the labels."""
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

    figures = (Figure("accuracy"),)

    def score(self, answer: str, reference: str) -> Scores:
        """Whether the answer's label is the reference."""
        return {"accuracy": float(self.label(answer) == reference.strip())}


class MacroF1(_Labels):
    """The labels' F1, each weighing the same: the mean of 2·tp / (2·tp + fp + fn) over the references' labels.

    As `sklearn.metrics.f1_score(references, answers, labels=sorted(set(references)), average="macro")`. An
    answer that is no label is a false negative of the right one. In a resample the labels are those that
    its references have.
    """

    def __init__(self) -> None:
        self.figures = (Figure("macro_f1", _macro_f1),)

    def columns(self, rows: Sequence[Row]) -> dict[str, Columns]:
        """For each label how often it was right, answered, and the reference."""
        labels = np.array(self._labels)
        answers = np.array([self.label(row.answer) or "" for row in rows])[:, None] == labels
        references = np.array([row.reference.strip() for row in rows])[:, None] == labels
        counts = np.stack([answers & references, answers, references], axis=-1)  # [rows, labels, 3]
        return {"macro_f1": counts.reshape(len(rows), -1).astype(np.float64)}


def _macro_f1(sums: Float[ndarray, "samples counts"]) -> Float[ndarray, "samples"]:
    right, answered, referred = np.moveaxis(sums.reshape(len(sums), -1, 3), -1, 0)
    f1 = 2 * right / np.maximum(answered + referred, 1)
    means: Float[ndarray, "samples"] = np.sum(f1, axis=1, where=referred > 0) / np.sum(referred > 0, axis=1)
    return means


# A number as people write it: sign, dollars, commas between thousands, decimals. A minus after a word,
# a number or a bracket is a subtraction or a hyphen.
_NUMBER = re.compile(r"(?:(?<![\w)\]])-\$?|\$-?|)(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)(?:\.\d+)?|(?:(?<![\w)\]])-)?\.\d+")


class NumericMatch(Share):
    """Share of answers whose final number is the reference's, as for GSM8K.

    The final number stands after `####`, where there is one with a number, and otherwise is the last
    of the text; it is compared by value: `$1,000.00` is 1000.
    """

    def __init__(self) -> None:
        super().__init__("numeric_match", lambda answer, reference: final_number(answer) == final_number(reference))

    def prepare(self, references: Sequence[str]) -> None:
        """Raises `InputError` for a reference without a number."""
        for index, reference in enumerate(references):
            if final_number(reference) is None:
                raise InputError(
                    f"metric gsm8k: the reference of row {index + 1} holds no number; give rows that end as "
                    "'#### 72', or leave the metric out"
                )


def final_number(text: str) -> Decimal | None:
    """The number that an answer arrives at, None where it holds none.

    Example:
        >>> final_number("48/2 = 24, and so it is $1,072.00 in all.")
        Decimal('1072.00')
    """
    text = text.replace("\N{MINUS SIGN}", "-")
    marked = _NUMBER.search(text.rpartition("####")[2]) if "####" in text else None
    found = marked.group() if marked else next(reversed(_NUMBER.findall(text)), None)
    return None if found is None else Decimal(re.sub("[$,]", "", found))


def regex_match(pattern: str) -> Share:
    """Share of answers in which Python's `re.search` finds the pattern."""
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"metric regex: {pattern!r} is no regular expression ({error}); mend it") from error
    return Share("regex_match", lambda answer, reference: compiled.search(answer) is not None)


_FENCE = re.compile(r"```(?:json|JSON)?[ \t]*\n(.*)\n[ \t]*```", re.DOTALL)


class JsonSchema(Share):
    """Share of answers that are JSON, bare or in a ```json fence, and valid by a JSON Schema.

    References that lead out of the schema are not followed: nothing is fetched.
    """

    def __init__(self, file: str) -> None:
        super().__init__("json_schema", self._is_valid)
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

    def _is_valid(self, answer: str, reference: str) -> bool:
        del reference
        fenced = _FENCE.fullmatch(answer.strip())
        try:
            value = json.loads(fenced[1] if fenced else answer, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return False
        try:
            return bool(self._validator.is_valid(value))
        except self._unresolvable as error:
            raise InputError(
                f"metric json_schema: {self._file} refers to {error.ref}, which is not in it; put it under $defs"
            ) from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")  # NaN and Infinity, which Python's parser takes


PLAIN: dict[str, Callable[[], Metric]] = {
    "loss": TokenLoss,
    "rouge": Rouge,
    "bleu": lambda: SacreBleu("bleu"),
    "chrf": lambda: SacreBleu("chrf"),
    "exact_match": lambda: Share("exact_match", same),
    "normalized_match": lambda: Share("normalized_match", same_normalized),
    "accuracy": Accuracy,
    "f1": MacroF1,
    "gsm8k": NumericMatch,
    "tool_call": ToolCalls,
}
WITH_VALUE: dict[str, tuple[Callable[[str], Metric], str]] = {
    "regex": (regex_match, "PATTERN"),
    "json_schema": (JsonSchema, "FILE"),
}
NAMES = (*PLAIN, *(f"{name}={value}" for name, (_, value) in WITH_VALUE.items()))


def split_metrics(text: str) -> list[str]:
    """The metrics of an option: between commas, but `regex=` and `json_schema=` have the rest to themselves.

    Example:
        >>> split_metrics("loss, rouge,regex=a{1,2},f1")
        ['loss', 'rouge', 'regex=a{1,2},f1']
    """
    specs: list[str] = []
    while text:
        if text.partition("=")[0].strip() in WITH_VALUE:
            return [*specs, text.strip()]
        spec, _, text = text.partition(",")
        specs.append(spec.strip())
    return specs


def make_metrics(specs: Sequence[str]) -> dict[str, Metric]:
    """The metrics of specifications such as `rouge` and `regex=PATTERN`, by name, in their order.

    Raises:
        InputError: A name is unknown or repeated, a value is missing, needless or wrong, or a library is not installed.
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
            near = did_you_mean(name, [*PLAIN, *WITH_VALUE])
            raise InputError(f"unknown metric {name!r}{near}; there are {', '.join(NAMES)}")
    if not metrics:
        raise InputError(f"no metric is given; give some of {', '.join(NAMES)}")
    return metrics


def _library(module: str, metric: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = {"rouge_score": "rouge-score"}.get(module.partition(".")[0], module.partition(".")[0])
        raise InputError(
            f"metric {metric} needs {name}, which is not installed; pip install 'phi3_jax[eval]'"
        ) from error
