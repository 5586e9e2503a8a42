"""Chat templates, which are programs that came with a checkpoint, rendered within bounds of time and memory.

jinja's sandbox keeps a template from files and from Python, but not from loops within loops and strings that
double. Templates of a plain kind, as Phi's own are, cannot do that by their very form, and are rendered here.
All others are rendered in a process of their own, which may take so much memory and is ended after so long.
"""

import atexit
import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from phi3_jax.data.template_process import Marked, render
from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.system.errors import InputError

SECONDS = 10.0  # for one conversation, which takes less than a millisecond
START_SECONDS = 120.0  # for the process to begin, on a machine that is busy
MEMORY = 2**30  # bytes beyond those that the process begins with
MAX_TEMPLATE = 2**18  # characters; the longest, with tools, have about 20,000

# What a plain template is made of; nothing that keeps a value from one round of a loop to the next, and
# nothing that makes a long text from a short one.
_PLAIN = (
    nodes.Template,
    nodes.Output,
    nodes.TemplateData,
    nodes.If,
    nodes.For,
    nodes.CondExpr,
    nodes.Const,
    nodes.Name,
    nodes.Getattr,
    nodes.Getitem,
    nodes.Slice,
    nodes.Compare,
    nodes.Operand,
    nodes.And,
    nodes.Or,
    nodes.Not,
    nodes.Add,
    nodes.Sub,
    nodes.Neg,
    nodes.Mod,
    nodes.Concat,
    nodes.Filter,
    nodes.Test,
    nodes.Call,
    nodes.Keyword,
    nodes.Tuple,
    nodes.List,
)
_FILTERS = {"capitalize", "default", "first", "int", "last", "length", "list", "lower", "string", "title", "tojson"}
_FILTERS |= {"trim", "upper"}
_TESTS = {"boolean", "defined", "eq", "equalto", "even", "false", "in", "integer", "iterable", "mapping", "ne", "none"}
_TESTS |= {"number", "odd", "sequence", "string", "true", "undefined"}
_METHODS = {"endswith", "get", "items", "keys", "lower", "lstrip", "rstrip", "split", "startswith", "strip", "upper"}
_METHODS |= {"title", "values"}


class _Generation(Extension):
    """transformers' block around what the assistant says; it changes nothing of the text."""

    tags = {"generation"}  # noqa: RUF012 (as jinja has it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, object]],
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
) -> str:
    """The text that the tokenizer's chat template makes of messages, as `apply_chat_template`.

    Args:
        tokenizer: Whose template, and whose special tokens.
        messages: Each with `role` and `content`.
        add_generation_prompt: Whether what opens an answer follows.
        continue_final_message: Whether the last message is left open.

    Raises:
        InputError: For a template that takes too long, or too much memory.
        Exception: Whatever the template raises.
    """
    settings = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
    return render_marked(tokenizer, messages, settings)[0]


def render_marked(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, object]], variables: Mapping[str, object]
) -> Marked:
    """The same with the places that the template itself marks as the assistant's, None where it marks none.

    Args:
        tokenizer: Whose template, and whose special tokens.
        messages: As JSON has them; keys that are None are left out, as `apply_chat_template` does.
        variables: What the template sees beside them, such as `tools`.

    Raises:
        InputError: For a template that takes too long, or too much memory.
        Exception: Whatever the template raises.
    """
    tools = variables.get("tools")
    template = tokenizer.get_chat_template(None, tools)
    if len(template) > MAX_TEMPLATE:
        raise InputError(f"the chat template has {len(template):,} characters, expected {MAX_TEMPLATE:,} at most")
    conversation = [{key: value for key, value in turn.items() if value is not None} for turn in messages]
    seen = {**tokenizer.special_tokens_map, **variables}
    if is_plain(template):
        return render(conversation=conversation, chat_template=template, **seen)
    return _WORKER.render(template, {"conversation": conversation, **seen})


@cache
def is_plain(template: str) -> bool:
    """Whether time and memory of rendering are bounded by the template's form: loops over the messages, none
    within another, and texts that are put one behind the other."""
    environment = Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"])
    try:
        return _is_plain(environment.parse(template), in_loop=False)
    except (TemplateError, RecursionError):
        return False


def _is_plain(node: nodes.Node, in_loop: bool) -> bool:
    if not isinstance(node, _PLAIN):
        return False
    if isinstance(node, nodes.For):
        if in_loop or node.recursive or not _is_messages(node.iter):
            return False
        in_loop = True
    # With arguments `tojson` and others make texts of any length.
    if isinstance(node, nodes.Filter) and (node.name not in _FILTERS or node.args or node.kwargs):
        return False
    if isinstance(node, nodes.Test) and node.name not in _TESTS:
        return False
    # A text on the left would be a format, whose fields can be of any width.
    if isinstance(node, nodes.Mod) and not _is_counter(node.left):
        return False
    if isinstance(node, nodes.Call) and not _is_harmless(node):
        return False
    return all(_is_plain(child, in_loop) for child in node.iter_child_nodes())


def _is_messages(node: nodes.Node) -> bool:
    """Whether it is the list of messages, or some of them."""
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        node = node.node
    return isinstance(node, nodes.Name) and node.name == "messages"


def _is_counter(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name) and node.node.name == "loop"


def _is_harmless(node: nodes.Call) -> bool:
    called = node.node
    if node.dyn_args is not None or node.dyn_kwargs is not None:
        return False
    if isinstance(called, nodes.Name):
        return called.name == "raise_exception"
    return isinstance(called, nodes.Getattr) and called.attr in _METHODS


class _Worker:
    """The process, begun when it is first needed; a new one after each that had to be ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._endless: set[str] = set()  # templates that the process had to be ended for

    def render(self, template: str, request: Mapping[str, object]) -> Marked:
        with self._lock:
            answer = None
            if template not in self._endless:
                if self._process is None or self._process.poll() is not None:
                    self._begin()
                answer = self._ask(json.dumps({"chat_template": template, **request}).encode() + b"\n", SECONDS)
        if answer is None:
            self._endless.add(template)
            raise InputError(
                f"the chat template takes longer than {SECONDS:g} s, or more than {MEMORY / 2**30:g} GiB, for one "
                "conversation; give a checkpoint with another"
            )
        kind, text, *places = json.loads(answer)
        if kind == "error":
            raise TemplateError(text)
        return str(text), [(start, end) for start, end in places[0]] if places else None

    def _begin(self) -> None:
        # -P: not the folder of the script, whose modules have other names than what it imports.
        program = [sys.executable, "-P", str(Path(__file__).with_name("template_process.py")), str(MEMORY)]
        self._process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        atexit.register(self._end, self._process)
        if self._ask(b"{}\n", START_SECONDS) is None:
            raise InputError("the chat template cannot be rendered: its process did not begin; try again")

    def _ask(self, line: bytes, seconds: float) -> bytes | None:
        """The line that answers, None where none comes in time; then the process is ended."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:  # it has ended
            answer = b""
        finally:
            timer.cancel()
        if answer.endswith(b"\n"):
            return answer
        self._end(process)
        self._process = None
        return None

    @staticmethod
    def _end(process: "subprocess.Popen[bytes]") -> None:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was not written any more
                    pipe.close()


_WORKER = _Worker()
