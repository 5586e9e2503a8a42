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
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser

from phi3_jax.data.template_process import NOT_ANSWERED, Marked, render
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
    template, conversation, seen = _request(tokenizer, messages, variables)
    if is_plain(template):
        return render(conversation=conversation, chat_template=template, **seen)
    return _WORKER.render(template, {"conversation": conversation, **seen})


def has_process(tokenizer: Tokenizer) -> bool:
    """Whether a process renders, since the template's form does not bound time and memory."""
    try:
        return not is_plain(tokenizer.get_chat_template(None, None))
    except ValueError:  # it has several templates, and none for conversations without tools
        return False


def look_ahead(
    tokenizer: Tokenizer, requests: Sequence[tuple[Sequence[Mapping[str, object]], Mapping[str, object]]]
) -> None:
    """Renders what `render_marked` is about to be asked for, where all at once takes less time than each alone.

    Args:
        tokenizer: Whose template.
        requests: Messages, and what the template sees beside them.

    Raises:
        InputError: As `render_marked`.
    """
    asked: dict[str, list[dict[str, object]]] = {}
    for messages, variables in requests:
        template, conversation, seen = _request(tokenizer, messages, variables)
        if not is_plain(template):
            asked.setdefault(template, []).append({"conversation": conversation, **seen})
    if len(asked) == 1:  # a tokenizer with a template of its own for tools has two
        [(template, found)] = asked.items()
        _WORKER.look_ahead(template, found)


def _request(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, object]], variables: Mapping[str, object]
) -> tuple[str, list[dict[str, object]], dict[str, object]]:
    tools = variables.get("tools")
    template = tokenizer.get_chat_template(None, tools)
    if len(template) > MAX_TEMPLATE:
        raise InputError(f"the chat template has {len(template):,} characters, expected {MAX_TEMPLATE:,} at most")
    conversation = [{key: value for key, value in turn.items() if value is not None} for turn in messages]
    return template, conversation, {**tokenizer.special_tokens_map, **variables}


@cache
def may_read(template: str, name: str, *, is_variable: bool = False) -> bool:
    """Whether a template could show what stands under a name; True where its form does not tell.

    Args:
        template: The template.
        name: A key of messages.
        is_variable: Whether it is a variable of the template instead, such as `tools`.

    Example:
        >>> template = "{% for m in messages %}{{ m.content + m['tools'] }}{% endfor %}"
        >>> may_read(template, "tools"), may_read(template, "tool_calls"), may_read(template, "tools", is_variable=True)
        (True, False, False)
    """
    try:
        parsed = _environment().parse(template)
        if is_variable:
            return name in find_undeclared_variables(parsed)
        return name in template or _uses_whole(parsed, _messages_names(parsed))
    except (TemplateError, RecursionError):
        return True


def _messages_names(parsed: nodes.Template) -> set[str]:
    """The names that the messages, each of them, and whatever is set or gone through may have."""
    bound = [loop.target for loop in parsed.find_all(nodes.For)]
    bound += [assignment.target for assignment in parsed.find_all(nodes.Assign)]
    names = (name for target in bound for name in (target, *target.find_all(nodes.Name)))
    return {"messages", *(name.name for name in names if isinstance(name, nodes.Name))}


def _uses_whole(node: nodes.Node, names: set[str]) -> bool:
    """Whether a value with one of the names is used but for a key of it that the template spells out."""
    for child in node.iter_child_nodes():
        is_value = isinstance(child, nodes.Name) and child.ctx == "load" and child.name in names
        if (is_value and not _is_spelt_out(node, child)) or _uses_whole(child, names):
            return True
    return False


def _is_spelt_out(node: nodes.Node, value: nodes.Node) -> bool:
    if isinstance(node, nodes.Getattr):
        return node.attr not in ("items", "values", "get")
    if isinstance(node, nodes.Getitem):
        return value is node.node and isinstance(node.arg, nodes.Const | nodes.Slice)
    return isinstance(node, nodes.Compare | nodes.Operand | nodes.Test | nodes.For)


def _environment() -> Environment:
    return Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"])


@cache
def is_plain(template: str) -> bool:
    """Whether time and memory of rendering are bounded by the template's form: loops over the messages, none
    within another, and texts that are put one behind the other."""
    try:
        return _is_plain(_environment().parse(template), in_loop=False)
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


class _Watchdog:
    """Ends processes that take too long: one thread for all requests, which only looks when a time has run out."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._until: float | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._is_idle = True  # whether the thread waits for a request, and not for the end of one
        self._thread: threading.Thread | None = None

    def watch(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        """Ends the process in so many seconds, unless `calm` is called before."""
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()
            until = time.monotonic() + seconds
            is_sooner = self._until is None or until < self._until
            self._process, self._until = process, until
            if self._is_idle or is_sooner:
                self._changed.notify()

    def calm(self) -> None:
        with self._changed:
            self._process = None

    def _run(self) -> None:
        with self._changed:
            while True:
                self._is_idle = self._process is None
                left = None if self._until is None or self._is_idle else self._until - time.monotonic()
                if left is not None and left <= 0 and self._process is not None:
                    self._process.kill()
                    self._process = None
                else:
                    self._changed.wait(left)


class _Worker:
    """The process, begun when it is first needed; a new one after each that had to be ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watchdog = _Watchdog()
        self._process: subprocess.Popen[bytes] | None = None
        self._sent: dict[str, int] = {}  # templates that the process has, by their numbers
        self._endless: set[str] = set()  # templates that the process had to be ended for
        self._alone: set[str] = set()  # templates that took too long or too much for several conversations
        self._ahead: dict[tuple[str, str], bytes] = {}  # answers to what was not asked yet

    def render(self, template: str, request: Mapping[str, object]) -> Marked:
        asked = json.dumps(request)
        with self._lock:
            answer = self._ahead.get((template, asked))
            if answer is None and template not in self._endless:
                answer = next(iter(self._answers(template, [asked])), None)
                if answer is None:
                    self._endless.add(template)
        if answer is None:
            raise InputError(
                f"the chat template takes longer than {SECONDS:g} s, or more than {MEMORY / 2**30:g} GiB, for one "
                "conversation; give a checkpoint with another"
            )
        kind, text, *places = json.loads(answer)
        if kind == "error":
            raise TemplateError(text)
        return str(text), [(start, end) for start, end in places[0]] if places else None

    def look_ahead(self, template: str, requests: Sequence[Mapping[str, object]]) -> None:
        """Asks for all at once what `render` will be asked for; what of it is not answered in time is asked again."""
        asked = list(dict.fromkeys(json.dumps(request) for request in requests))
        with self._lock:
            self._ahead.clear()
            if asked and template not in self._alone:
                answers = self._answers(template, asked)
                if len(answers) < len(asked):
                    self._alone.add(template)
                self._ahead = {(template, text): answer for text, answer in zip(asked, answers, strict=False)}

    def _answers(self, template: str, asked: Sequence[str]) -> list[bytes]:
        """An answer for each, or for the first of them, where the others took too long or too much."""
        if self._process is None or self._process.poll() is not None:
            self._begin()
        number = self._sent.get(template)
        known = "null" if number is not None else json.dumps(template)
        number = self._sent.setdefault(template, len(self._sent))
        return self._ask(f"[{number}, {known}, [{', '.join(asked)}]]\n".encode(), len(asked), SECONDS)

    def _begin(self) -> None:
        # -P: not the folder of the script, whose modules have other names than what it imports.
        program = [sys.executable, "-P", str(Path(__file__).with_name("template_process.py")), str(MEMORY)]
        self._process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._sent.clear()
        atexit.register(self._end, self._process)
        if not self._ask(b'[0, "", [{"conversation": []}]]\n', 1, START_SECONDS):
            raise InputError("the chat template cannot be rendered: its process did not begin; try again")

    def _ask(self, line: bytes, count: int, seconds: float) -> list[bytes]:
        """The lines that answer; the process is ended where not all come in time."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        answers: list[bytes] = []
        self._watchdog.watch(process, seconds)
        try:
            process.stdin.write(line)
            process.stdin.flush()
            while len(answers) < count and (answer := process.stdout.readline()).endswith(b"\n"):
                answers.append(answer)
        except OSError:  # it has ended
            pass
        finally:
            self._watchdog.calm()
        if len(answers) < count:
            self._end(process)
            self._process = None
        while answers and answers[-1] == NOT_ANSWERED:
            answers.pop()
        return answers

    @staticmethod
    def _end(process: "subprocess.Popen[bytes]") -> None:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was not written any more
                    pipe.close()


_WORKER = _Worker()
