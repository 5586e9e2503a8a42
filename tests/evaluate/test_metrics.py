"""Metrics, held against their libraries, on whole sets and on resamples of them."""

import json
import re
import sys
from decimal import Decimal

import numpy as np
import pytest

from phi3_jax.evaluate.metric import Row
from phi3_jax.evaluate.metrics import final_number, make_metrics, split_metrics
from phi3_jax.report.statistics import estimate
from phi3_jax.system.errors import InputError

REFERENCES = [
    "The cat sat on the mat.\nIt was running late.",
    "A quick brown fox jumps over the lazy dogs.",
    "Nothing in common",
    "yes",
    "Zürich liegt in der Schweiz.",
]
ANSWERS = [
    "The cat was sitting on a mat.\nIt runs late.",
    "A quick brown fox jumped over the lazy dog!",
    "",
    "yes",
    "Zürich liegt am See, in der Schweiz.",
]


def rows_of(metric, answers, references):
    metric.prepare(references)
    return [Row(a, r, metric.score(a, r)) for a, r in zip(answers, references, strict=True)]


def figures(spec, answers=ANSWERS, references=REFERENCES, chosen=None):
    """Every figure of the metric; `chosen`, of these rows, by the statistics of all."""
    ((_, metric),) = make_metrics([spec]).items()
    columns = metric.columns(rows_of(metric, answers, references))
    part = slice(None) if chosen is None else chosen
    return {figure.name: estimate(columns[figure.name][part], statistic=figure.statistic) for figure in metric.figures}


def test_rouge_is_rouge_scores_with_the_stemmer():
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = RougeScorer(names, use_stemmer=True)
    scores = [scorer.score(target=r, prediction=a) for a, r in zip(ANSWERS, REFERENCES, strict=True)]
    found = figures("rouge")
    assert found == pytest.approx({name: np.mean([score[name].fmeasure for score in scores]) for name in names})
    assert found["rougeLsum"] != found["rougeL"]
    unstemmed = RougeScorer(["rouge1"]).score(REFERENCES[0], ANSWERS[0])["rouge1"].fmeasure
    assert scores[0]["rouge1"].fmeasure > unstemmed


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 4], [0, 0, 4, 1], [3, 2]], ids=["all", "resample", "no 4-gram"])
def test_bleu_and_chrf_are_sacrebleus_of_any_rows(chosen):
    import sacrebleu

    answers, references = [ANSWERS[i] for i in chosen], [[REFERENCES[i] for i in chosen]]
    assert figures("bleu", chosen=chosen)["bleu"] == pytest.approx(sacrebleu.corpus_bleu(answers, references).score)
    assert figures("chrf", chosen=chosen)["chrf"] == pytest.approx(sacrebleu.corpus_chrf(answers, references).score)


def test_macro_f1_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    references = rng.choice(["joy", "fear", "anger", "rare"], 60, p=[0.5, 0.3, 0.18, 0.02]).tolist()
    answers = [r if rng.random() < 0.6 else rng.choice(["joy", "fear", "other"]) for r in references]
    answers[0] = "I cannot tell"
    assert "rare" in references
    for chosen in (np.arange(60), rng.integers(60, size=60), np.arange(10)):
        own = [references[i] for i in chosen]
        expected = metrics.f1_score(own, [answers[i] for i in chosen], labels=sorted(set(own)), average="macro")
        assert figures("f1", answers, references, chosen)["macro_f1"] == pytest.approx(expected, rel=1e-12)
    expected = metrics.accuracy_score(references, answers)
    assert figures("accuracy", answers, references)["accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [(" Yes\n", 1), ("yes.", 1), ("YES", 1), ("No", 0), ("Yes, it is", 0), ("maybe", 0), ("a", 0), ("", 0)],
)
def test_an_answer_is_a_label_whatever_its_case_and_full_stop(answer, is_right):
    references = ["Yes", "No", "A", "a"]  # `A.` could be two of them
    (metric,) = make_metrics(["accuracy"]).values()
    metric.prepare(references)
    assert metric.score(answer, "Yes") == {"accuracy": is_right}
    assert metric.score("A", "A") == {"accuracy": 1}
    assert metric.score("A.", "A") == metric.score("A.", "a") == {"accuracy": 0}


def test_exact_and_normalized_match():
    answers = ["yes ", "The answer: yes!", "A Yes.", "no"]
    references = ["yes", "answer yes", "yes", "yes"]
    assert figures("exact_match", answers, references) == {"exact_match": 0.25}
    assert figures("normalized_match", answers, references) == {"normalized_match": 0.75}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", "72"),
        ("It is 5.\n#### $1,000.00\nor 6", "1000"),
        ("48/2 = 24, and 48+24 = 72.", "72"),
        ("x = 5-3", "3"),
        ("(4)-3", "3"),
        ("it falls to -5.50.", "-5.5"),
        ("a loss of -$5", "-5"),
        ("$-5", "-5"),
        ("minus \N{MINUS SIGN}7 degrees", "-7"),
        ("1,2,3", "3"),
        ("1,234,567 people", "1234567"),
        (".5", "0.5"),
        ("18.0", "18"),
        ("10%", "10"),
        ("#### none, but 5", "5"),
        ("3 #### none", "3"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_gsm8k(testdata):
    lines = (testdata / "datasets" / "gsm8k" / "test-200.jsonl").read_text().splitlines()
    references = [json.loads(line)["answer"] for line in lines]
    assert [final_number(r) for r in references] == [Decimal(r.split("#### ")[1].replace(",", "")) for r in references]
    answers = [f"So it is ${final_number(r):,}.00 in all." for r in references]
    answers[0] = "#### 0"
    assert figures("gsm8k", answers, references)["numeric_match"] == 199 / 200
    with pytest.raises(InputError, match=r"row 2 holds no number; .*#### 72"):
        figures("gsm8k", ["1", "2"], ["1", "one"])


def test_a_regular_expression_is_searched_for():
    answers = ["item: a; count: 3", "item: a", "an item: b; count: 12;"]
    assert figures(r"regex=item: \w+; count: \d{1,2}", answers, [""] * 3) == {"regex_match": 2 / 3}
    with pytest.raises(InputError, match=re.escape("'(' is no regular expression (missing )")):
        make_metrics(["regex=("])


SCHEMA = {
    "type": "object",
    "properties": {"count": {"$ref": "#/$defs/count"}},
    "required": ["count"],
    "$defs": {"count": {"type": "integer", "minimum": 1}},
}


@pytest.mark.parametrize(
    ("answer", "is_valid"),
    [
        ('{"count": 3}', 1),
        ('  {"count": 3, "more": null}\n', 1),
        ('```json\n{"count": 3}\n```', 1),
        ('```\n{\n"count": 3\n}\n```\n', 1),
        ('{"count": 0}', 0),
        ('{"count": "3"}', 0),
        ("{}", 0),
        ('Here it is: {"count": 3}', 0),
        ('{"count": 3', 0),
        ('{"count": 3, "more": NaN}', 0),
        ("[" * 100_000, 0),
        ("", 0),
    ],
)
def test_json_schema(answer, is_valid, tmp_path):
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    (metric,) = make_metrics([f"json_schema={file}"]).values()
    assert metric.score(answer, "") == {"json_schema": is_valid}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ('{"type": "obj"}', "is no JSON Schema"),
        ("3", "is no JSON Schema"),
        ('{"$schema": "draft-of-my-own", "type": 3}', "is no JSON Schema"),
    ],
)
def test_a_schema_that_is_none_is_refused(content, words, tmp_path):
    file = tmp_path / "schema.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=words) as error:
        make_metrics([f"json_schema={file}"])
    assert str(file) in str(error.value)


def test_a_schema_elsewhere_is_not_fetched(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: opened.append(args))
    file = tmp_path / "schema.json"
    file.write_text('{"$ref": "http://127.0.0.1:9/other.json"}')
    (metric,) = make_metrics([f"json_schema={file}"]).values()
    with pytest.raises(InputError, match=r"refers to http://127.0.0.1:9/other.json, which is not in it"):
        metric.score("{}", "")
    assert opened == []


def test_a_pattern_has_the_rest_of_its_text():
    assert split_metrics("loss, rouge,regex=a{1,2},f1") == ["loss", "rouge", "regex=a{1,2},f1"]
    assert split_metrics("json_schema=a,b.json") == ["json_schema=a,b.json"]


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        (["rogue"], "unknown metric 'rogue'; did you mean rouge?"),
        (["schema=x.json"], "did you mean json_schema?"),
        (["loss", "loss"], "loss is given twice"),
        (["regex"], "give regex=PATTERN"),
        (["json_schema="], "give json_schema=FILE"),
        (["loss=1"], "takes no value"),
        ([], "no metric is given"),
    ],
)
def test_wrong_metrics_are_told(specs, words):
    with pytest.raises(InputError, match=re.escape(words)):
        make_metrics(specs)


@pytest.mark.parametrize(
    ("spec", "module", "package"),
    [
        ("rouge", "rouge_score.rouge_scorer", "rouge-score"),
        ("chrf", "sacrebleu.metrics", "sacrebleu"),
        ("json_schema=x", "jsonschema", "jsonschema"),
    ],
)
def test_a_library_that_is_missing_is_named(spec, module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"needs {package}, .*pip install 'phi3_jax\[eval\]'"):
        make_metrics([spec])
