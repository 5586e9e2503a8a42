"""Reports, and parts of them, as their templates write them."""

from html.parser import HTMLParser

from phi3_jax.report import chart
from phi3_jax.report.page import environment
from phi3_jax.report.write import write_report
from tests.helpers.pages import run_report


def macro(template: str, name: str, *arguments: object) -> str:
    """What a template's macro makes of the arguments."""
    return str(getattr(environment().get_template(template).module, name)(*arguments))


def line_chart(*arguments: object, **settings: object) -> str:
    """The SVG of a line chart, "" where there is nothing to draw."""
    drawn = chart.line_chart(*arguments, **settings)
    return "" if drawn is None else macro("charts.html", "lines", drawn)


def bar_chart(*arguments: object, **settings: object) -> str:
    """The same of a bar chart."""
    drawn = chart.bar_chart(*arguments, **settings)
    return "" if drawn is None else macro("charts.html", "bars", drawn)


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
    """The page that a function writes to `report.html`, of which nothing else is left."""
    path = tmp_path / "report.html"
    write(path, **arguments)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    return Page(path.read_text(encoding="utf-8"))


def report(tmp_path, **changes) -> Page:
    """The report of a run like the demo's, with changes."""
    return page(tmp_path, write_report, run_report() | changes)
