"""A page of HTML from templates, in one file that loads nothing else, in which text stays text."""

from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from phi3_jax.report.chart import PLOT
from phi3_jax.system.files import write_text
from phi3_jax.system.secrets import redact
from phi3_jax.system.text import printable


@cache
def environment() -> Environment:
    """The templates: what they show is escaped, and what is invisible or moves what is visible, written out."""
    templates = Environment(
        loader=PackageLoader("phi3_jax.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # What has `__html__` was escaped by the template that it comes from.
        finalize=lambda value: value if hasattr(value, "__html__") else printable(str(value)),
    )
    templates.globals["plot"] = PLOT
    templates.filters["place"] = "{:.1f}".format
    return templates


def write_page(path: str | Path, template: str, **values: object) -> None:
    """Writes the template's page, whole or not at all.

    Tokens are left out, see `phi3_jax.system.secrets`.

    Args:
        path: The file; one that is there is replaced.
        template: Its name, such as `run.html`.
        **values: What stands in the template.

    Raises:
        StorageError: The file cannot be written.
    """
    write_text(Path(path), redact(environment().get_template(template).render(values)))
