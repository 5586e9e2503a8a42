"""Chat templates to text, and the process in which `template` renders those that it does not trust.

The process reads lines of JSON: a template's number, the template where it is new, and requests. It writes a line for
each request.
"""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

MAX_TEXT = 2**26  # characters of an answer, and of several answers to one line
NOT_ANSWERED = b"null\n"  # where the answers before it are that long
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

# The text, and the places in it that stand between {% generation %} and {% endgeneration %}; none without the tag.
Marked = tuple[str, list[tuple[int, int]] | None]


def render(*, conversation: list[dict[str, object]], chat_template: str, **variables: object) -> Marked:
    """A conversation as `apply_chat_template` writes it, which gives the text alone or the tokens marked.

    Args:
        conversation: Messages.
        chat_template: The template.
        **variables: What it sees beside them.

    Raises:
        Exception: Whatever the template raises.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    # `continue_final_message` cuts the text, and transformers has no places for it either.
    marks = bool(_GENERATION.search(chat_template)) and not variables.get("continue_final_message")
    texts, places = render_jinja_template(
        [conversation], chat_template=chat_template, return_assistant_tokens_mask=marks, **variables
    )
    return str(texts[0]), [(int(start), int(end)) for start, end in places[0]] if marks else None


def main() -> None:
    """Serves requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # whatever a library says is no answer
    # Imports what rendering takes, before the memory is limited.
    render(conversation=[], chat_template="")
    _limit_memory(int(sys.argv[1]))
    templates: dict[int, str] = {}
    for line in sys.stdin.buffer:
        number, template, requests = json.loads(line)
        if template is not None:
            templates[number] = template
        written = 0
        for request in requests:
            line_of_answer = NOT_ANSWERED.decode()
            if written < MAX_TEXT:
                answer = _rendered(render, {**request, "chat_template": templates[number]})
                line_of_answer = json.dumps(answer) + "\n"
            answers.write(line_of_answer)
            written += len(line_of_answer)
        answers.flush()


def _rendered(render: Callable[..., Marked], request: dict[str, object]) -> tuple[object, ...]:
    try:
        text, places = render(**request)
    except MemoryError:
        return "error", "it needs too much memory"
    except Exception as error:  # a template can raise anything, most often what it says itself
        return "error", (str(error).strip() or type(error).__name__)[:2000]
    if len(text) > MAX_TEXT:
        return "error", f"it makes {len(text):,} characters"
    return ("text", text) if places is None else ("text", text, places)


def _limit_memory(more: int) -> None:
    try:
        import resource

        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + more, used + more))
    except (ImportError, OSError, ValueError):
        pass  # no such limits on this system; there the time alone is limited


if __name__ == "__main__":
    main()
