import re
from html.parser import HTMLParser

import pytest

from phi3_jax.evaluate import write_report
from phi3_jax.run_config import DataSection, ModelSection, PeftSection, RunConfig

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects a page's elements and text; balanced tags or an error."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.text = [], [], ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


def report(tmp_path, **changes) -> Page:
    run = RunConfig(ModelSection("hub/base-model"), data=DataSection(train="folder/chats.jsonl"))
    arguments = {
        "run_config": run.to_dict(),
        "history": [
            {"step": 0, "eval_loss": 2.5},
            {"step": 1, "loss": 2.0, "learning_rate": 1e-4, "tokens_per_second": 100.0, "mfu": 0.4},
            {"step": 2, "loss": 1.0, "learning_rate": 5e-5, "tokens_per_second": 300.0, "mfu": 0.4},
            {"step": 2, "eval_loss": 1.5},
        ],
        "before": {"eval_loss": 2.5, "eval_perplexity": 12.18, "eval_token_accuracy": 0.5, "exact_match": 0.0},
        "after": {"eval_loss": 1.5, "eval_perplexity": 4.48, "eval_token_accuracy": 0.75, "exact_match": 0.875},
        "samples": [{"prompt": "2 + 2?", "reference": "4", "before": "fish", "after": "4"}],
        "data_stats": {"train": {"rows": 1500, "target_tokens": 12345}, "eval": {"rows": 75}},
        "parameter_table": [("model.layers.mlp.down_proj", 5767168), ("lm_head", 100)],
        "versions": {"jax": "0.10.2"},
        "command": "phi3-jax train --config 'a b.yaml'",
    } | changes
    path = tmp_path / "report.html"
    write_report(path, **arguments)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    return Page(path.read_text(encoding="utf-8"))


def test_it_tells_what_was_run_and_what_came_of_it(tmp_path):
    page = report(tmp_path)
    for words in (
        "base-model on chats.jsonl",
        "LoRA fine-tuning",
        "1.5000",
        "before 2.5000",
        "4.48",
        "75.0%",
        "87.5%",
        "2 + 2?",
        "fish",
        "✓ as the reference",
        "1,500",
        "12,345",
        "model.layers.mlp.down_proj",
        "5,767,268",  # the total
        "200",  # median tokens a second
        "40.0%",
        "learning_rate",
        "0.10.2",
        "phi3-jax train --config 'a b.yaml'",
    ):
        assert words in page.text, words


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


HOSTILE = "</title></style></pre><script>alert('1')</script><img src=x onerror=\"alert(2)\">&lt;\x00\x1b\x9f\ud800"


def test_hostile_text_stays_text(tmp_path):
    harmless = {tag for tag, _ in report(tmp_path).elements}
    run = RunConfig(
        ModelSection(HOSTILE),
        PeftSection(target_modules=(HOSTILE,)),
        DataSection(train=HOSTILE, columns={HOSTILE: HOSTILE}),
    )
    page = report(
        tmp_path,
        run_config=run.to_dict(),
        samples=[dict.fromkeys(("prompt", "reference", "before", "after"), HOSTILE)],
        data_stats={HOSTILE: {HOSTILE: HOSTILE}, "notices": [HOSTILE]},
        parameter_table=[(HOSTILE, 3)],
        versions={HOSTILE: HOSTILE},
        command=HOSTILE,
    )
    assert {tag for tag, _ in page.elements} == harmless
    assert page.text.count("<script>alert('1')</script>") >= 15
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", page.text)


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
    )
    assert "svg" not in {tag for tag, _ in page.elements}
    for heading in ("Answers", "Exact match", "Speed", "Data\n", "Reproduce", "before "):
        assert heading not in page.text
    assert ("Perplexity" in page.text) == bool(after)
    assert "Configuration" in page.text


def test_a_worse_result_is_not_shown_as_a_better_one(tmp_path):
    before = {"eval_loss": 1.0, "eval_perplexity": 2.7, "eval_token_accuracy": 0.5, "exact_match": 0.5}
    after = {"eval_loss": 2.0, "eval_perplexity": 2.7, "eval_token_accuracy": 0.4, "exact_match": 0.6}
    page = report(tmp_path, before=before, after=after)
    notes = [a["class"] for tag, a in page.elements if a.get("class", "").startswith("note")]
    assert notes == ["note worse", "note same", "note worse", "note better"]


def test_many_answers_are_folded_away(tmp_path):
    sample = {"prompt": "p", "reference": "r", "before": "b", "after": "a"}
    page = report(tmp_path, samples=[sample] * 50)
    assert "44 more" in page.text
    assert sum(tag == "article" for tag, _ in page.elements) == 50
