import re

import pytest

from phi3_jax.report.write import write_evaluation_report, write_report
from tests.helpers.pages import HOSTILE, evaluation_report, run_report
from tests.helpers.rendered import page, report


def test_it_tells_what_was_run_and_what_came_of_it(tmp_path):
    page = report(tmp_path)
    for words in (
        "base-model on chats.jsonl",
        "LoRA fine-tuning",
        "rank 16, α 32 on qkv_proj, o_proj · 5,767,268 trainable parameters",
        "0.0098[0.0070, 0.0120]↓ before 11.3491[11.1000, 11.6000] · p\u00a0=\u00a00.031",
        "1.0098↓ before 84,892",
        "99.8%↑ before 26.8%",
        "94.0%[90.0%, 97.0%]↑ before 0.0%[0.0%, 1.8%] · p\u00a0<\u00a00.001",
        "12 red mugs to Oslo?",
        "Of course, mugs for Oslo.",
        "After ✓ as the reference",
        "1,500",
        "10,000 (25.0%)",  # tokens trained on
        "30,000 (75.0%)",  # masked
        "30 (2.0%)",  # rows cut
        "80.0%",  # packing
        "train: 30 rows lost their end",
        "model.layers.mlp.down_proj",
        "30,095",  # median tokens a second
        "40.0%",
        "4 min 05 s",
        "351,732",
        "3.00 GiB",
        "learning_rate",
        "0.10.2",
        "phi3-jax train --config 'a b.yaml'",
    ):
        assert words in page.text, words
    assert "device memory" not in page.text


def test_the_curves_have_a_point_for_each_row_of_the_history(tmp_path):
    history = [{"step": s, "loss": 1 / s, "learning_rate": s * 1e-6} for s in range(1, 101)]
    history += [{"step": s, "eval_loss": 1 / s} for s in range(10, 101, 10)]
    page = report(tmp_path, history=history)
    lines = {a["class"]: len(a["points"].split()) for tag, a in page.elements if tag == "polyline"}
    assert lines == {"train": 100, "eval": 10, "rate": 100}


def test_it_loads_nothing(tmp_path):
    page = report(tmp_path)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for _, attributes in page.elements:
        assert not {"src", "href", "srcset", "onload", "style"} & set(attributes)
    style = re.search(r"<style>(.*?)</style>", (tmp_path / "report.html").read_text(), re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style


@pytest.mark.parametrize(
    ("write", "arguments"), [(write_report, run_report), (write_evaluation_report, evaluation_report)]
)
def test_hostile_text_stays_text(tmp_path, write, arguments):
    harmless = {tag for tag, _ in page(tmp_path, write, arguments()).elements}
    hostile = page(tmp_path, write, arguments(HOSTILE, HOSTILE))
    assert {tag for tag, _ in hostile.elements} == harmless
    assert hostile.text.count("<script>alert('1')</script>") >= 15
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202e]", hostile.text)
    assert r"\x00\x1b\x9f\ud800\u202e" in hostile.text


def test_tokens_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-no-known-form")
    name = "https://me:a-secret@host/a-token-of-no-known-form/data"
    report(tmp_path, command=f"phi3-jax train --data.train {name}", versions={name: name})
    html = (tmp_path / "report.html").read_text()
    assert "a-token-of" not in html
    assert "a-secret" not in html
    assert "REDACTED@host/REDACTED/data" in html


@pytest.mark.parametrize("after", [None, {}, {"eval_loss": 1.5, "eval_perplexity": 4.48, "eval_token_accuracy": 0.7}])
def test_what_was_not_measured_is_left_out(tmp_path, after):
    page = report(
        tmp_path,
        history=[],
        before=None,
        after=after,
        samples=[],
        data_stats={},
        parameter_table=[],
        versions={},
        command="",
        train_results={},
        memory={},
    )
    assert "svg" not in {tag for tag, _ in page.elements}
    for heading in ("Answers", "Exact match", "Speed", "Data\n", "Reproduce", "before "):
        assert heading not in page.text
    assert ("Perplexity" in page.text) == bool(after)
    assert "Configuration" in page.text
