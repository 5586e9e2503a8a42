"""Parts of a page as their templates write them."""

from phi3_jax.report import chart
from phi3_jax.report.page import environment


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
