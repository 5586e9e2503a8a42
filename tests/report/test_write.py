import re
from html.parser import HTMLParser

import pytest

from phi3_jax.report.write import write_evaluation_report, write_report
from tests.helpers.pages import HOSTILE, evaluation_report, run_report

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


def page(tmp_path, write, arguments) -> Page:
    path = tmp_path / "report.html"
    write(path, **arguments)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    return Page(path.read_text(encoding="utf-8"))


def report(tmp_path, **changes) -> Page:
    return page(tmp_path, write_report, run_report() | changes)


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


def test_a_worse_result_is_not_shown_as_a_better_one(tmp_path):
    before = {"eval_loss": 1.0, "eval_perplexity": 2.7, "eval_token_accuracy": 0.5, "exact_match": 0.5}
    after = {"eval_loss": 2.0, "eval_perplexity": 2.7, "eval_token_accuracy": 0.4, "exact_match": 0.6}
    page = report(tmp_path, before=before, after=after)
    notes = [a["class"] for tag, a in page.elements if a.get("class", "").startswith("note ")]
    assert notes == ["note worse", "note same", "note worse", "note better"]


def sample(before: str, after: str, reference: str = "yes", prompt: str = "p") -> dict[str, str]:
    return {"prompt": prompt, "reference": reference, "before": before, "after": after}


def test_many_answers_are_folded_away_and_those_left_out_are_counted(tmp_path):
    page = report(tmp_path, samples=[sample("no", "never")] * 50)
    assert "50 still wrong" in page.text
    assert "37 more of 47" in page.text
    assert sum(tag == "article" for tag, _ in page.elements) == 40


def test_answers_that_became_right_or_wrong_come_first_then_the_most_changed(tmp_path):
    samples = [
        sample("yes", "yes", prompt="#1"),
        sample("one two three four", "one two three five", prompt="#2"),
        sample("one two three four", "six seven", prompt="#3"),
        sample("yes", "no", prompt="#4"),
        sample("no", " yes\n", prompt="#5"),
        sample("a", "b", prompt="#6", reference=""),
    ]
    page = report(tmp_path, samples=samples)
    assert re.findall(r"#\d", page.text) == ["#5", "#4", "#3", "#2", "#1", "#6"]
    assert "1 became right · 1 became wrong · 2 still wrong · 1 still right" in page.text


def test_shares_are_drawn_on_the_whole_way_from_none_to_all(tmp_path):
    changes = {"exact_match": 0.0, "exact_match_interval": (0.0, 0.5)}, {"exact_match": 1.0}
    page = report(tmp_path, before=changes[0], after=changes[1])
    dots = [a for tag, a in page.elements if tag == "circle" and a["r"] == "4"]
    lines = [a for tag, a in page.elements if tag == "line" and a["class"] == "quiet"]
    assert [(dot["class"], dot["cx"]) for dot in dots] == [("quiet", "6.0"), ("train", "194.0")]
    assert [(line["x1"], line["x2"]) for line in lines] == [("6.0", "100.0")]


def test_what_the_last_answer_lacks_of_the_reference_is_marked_and_no_reference_repeats_an_answer(tmp_path):
    report(tmp_path, samples=[sample("hm", "count: 21", "count: 12")])
    html = (tmp_path / "report.html").read_text()
    assert "count: <mark>12</mark>" in html
    assert "<h4>Reference" in html
    report(tmp_path, samples=[sample("hm", "count: 12", "count: 12")])
    assert "<h4>Reference" not in (tmp_path / "report.html").read_text()


def test_lengths_have_a_bar_for_each_bin_and_one_for_what_was_cut(tmp_path):
    page = report(tmp_path)
    bars = [a for tag, a in page.elements if tag == "rect" and a["class"] in ("train", "eval") and "height" in a]
    heights = {}
    for style in ("train", "eval"):
        heights[style] = [float(a["height"]) for a in bars if a["class"] == style and a["y"] != "0"]
    train = heights["train"][:3]
    assert train[1] == 0
    assert train[2] / train[0] == pytest.approx(1170 / 300, rel=0.01)
    assert heights["eval"] == [pytest.approx(train[0] / 10, abs=0.1)]  # 30 rows, in the set that lost some
    assert "longer, and cut: 30 rows" in page.text


def test_the_parts_of_the_positions_add_up(tmp_path):
    page = report(tmp_path)
    for words in ("trained on 20.0%", "masked 60.0%", "padding 20.0%"):
        assert words in page.text
    widths = [float(a["width"]) for tag, a in page.elements if tag == "rect" and a["y"] == "0"]
    assert widths == pytest.approx([96, 288, 96] * 2)


def test_an_evaluation_has_a_column_for_each_model(tmp_path):
    shown = page(tmp_path, write_evaluation_report, evaluation_report())
    for words in (
        "3 models on chats.jsonl",
        "Exact match0.0%[0.0%, 10.0%]33.3%[23.3%, 43.3%]p\u00a0<\u00a00.00166.7%",
        "Loss1.00001.33331.6667",
        "some checknot measured0.3333",
        "1 right in some · 1 wrong",
        "model-2 ✗ wrong",
    ):
        assert words in shown.text.replace("\n", ""), words
    html = (tmp_path / "report.html").read_text()
    assert re.findall(r'class="value best">([^<]*)', html) == ["66.7%", "1.0000", "0.6667"]


def test_an_evaluation_of_one_model_has_nothing_to_compare(tmp_path):
    arguments = evaluation_report(models=1)
    del arguments["samples"][1]
    arguments["samples"][0]["right"] = [True]  # by another measure than being equal
    shown = page(tmp_path, write_evaluation_report, arguments)
    assert "1 right" in shown.text
    assert "✓ right" in shown.text
    assert not {"ins", "del"} & {tag for tag, _ in shown.elements}
    assert "best" not in {a.get("class") for _, a in shown.elements}
