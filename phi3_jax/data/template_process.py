"""The process that `template` has render what it does not render itself: JSON lines in, JSON lines out."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

MAX_TEXT = 2**26  # characters of an answer


def main() -> None:
    """Serves requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # whatever a library says is no answer
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    # The template and the special tokens are the request's; of this tokenizer nothing is used.
    render = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).apply_chat_template
    _limit_memory(int(sys.argv[1]))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        answer = _rendered(render, request) if request else ("text", "")
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _rendered(render: Callable[..., object], request: dict[str, object]) -> tuple[str, str]:
    try:
        text = str(render(**request, tokenize=False))
    except MemoryError:
        return "error", "it needs too much memory"
    except Exception as error:  # a template can raise anything, most often what it says itself
        return "error", (str(error).strip() or type(error).__name__)[:2000]
    return ("text", text) if len(text) <= MAX_TEXT else ("error", f"it makes {len(text):,} characters")


def _limit_memory(more: int) -> None:
    try:
        import resource

        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + more, used + more))
    except (ImportError, OSError, ValueError):
        pass  # no such limits on this system; there the time alone is limited


if __name__ == "__main__":
    main()
