"""Chat templates within bounds: the same text as transformers', and an error in place of a hang."""

import pytest
from jinja2 import TemplateError

from phi3_jax.data import template
from phi3_jax.data.chat import ChatTokenizer
from phi3_jax.data.formats import Conversation, Turn
from phi3_jax.data.template import is_plain, may_read, render_chat
from phi3_jax.system.errors import InputError
from tests.helpers.tokenizers import JULY, PHI_4_MINI, phi3_tokenizer, templates

MESSAGES = [{"role": "user", "content": "é\n<|end|>"}, {"role": "assistant", "content": " b"}]
NAMESPACE = (
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{{ ns.n ~ '<|' ~ m.role ~ '|>' ~ m.content | trim ~ '<|end|>' }}{% endfor %}{{ messages[0] | tojson(indent=1) }}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}{{ bos_token }}{% generation %}x{% endgeneration %}"
)
ROUNDS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "rounds within rounds": ROUNDS,
    "a text that doubles": "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x=n.x ~ n.x %}{% endfor %}",
    "a text of 10^10": "{{ 'x' * 10**10 }}",
    "a wide field": "{{ '%10000000000d' % 1 }}",
    "a wide format": "{{ '{:>10000000000}'.format(1) }}",
    "a wide centre": "{{ 'x'.center(10**10) }}",
    "a large number": "{{ 99**99**99**99**99 }}",
    "macros that double": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a wide indent": "{{ messages | tojson(indent=10**10) }}",
}


@pytest.fixture
def tokenizer():
    return phi3_tokenizer(JULY)


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 1.5)


@pytest.mark.parametrize("settings", [{}, {"add_generation_prompt": True}, {"continue_final_message": True}])
def test_the_text_is_that_of_transformers(tokenizer, settings):
    for text in (JULY, NAMESPACE):
        tokenizer.chat_template = text
        expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, **settings)
        assert render_chat(tokenizer, MESSAGES, **settings) == expected
    assert is_plain(JULY)
    assert not is_plain(NAMESPACE)


def test_templates_of_the_family_need_no_process(testdata, monkeypatch):
    monkeypatch.setattr(template, "_WORKER", None)
    for tokenizer in templates().values():
        assert render_chat(tokenizer, MESSAGES)


@pytest.mark.parametrize("name", HOSTILE)
def test_what_would_never_end_ends(name, tokenizer, soon):
    tokenizer.chat_template = HOSTILE[name]
    assert not is_plain(HOSTILE[name])
    with pytest.raises((TemplateError, InputError), match="memory|takes longer|too large|limit|overflow|digits"):
        render_chat(tokenizer, MESSAGES)
    tokenizer.chat_template = NAMESPACE  # the next one has a process again
    assert render_chat(tokenizer, MESSAGES)


def test_a_row_is_named_and_a_template_that_never_ends_is_tried_once(tokenizer, soon):
    tokenizer.chat_template = ROUNDS + "{{ messages[0].content }}"
    chat = ChatTokenizer(tokenizer)
    began = template._WORKER._process
    for _ in range(3):
        with pytest.raises(InputError, match="^row 7: the chat template takes longer"):
            chat.render(Conversation((Turn("user", "u"), Turn("assistant", "a"))), "row 7")
    assert template._WORKER._process is began is None  # ended at the first try, and begun no more


def test_many_are_asked_for_at_once_and_what_fails_or_hangs_among_them_alone(tokenizer, soon, monkeypatch):
    tokenizer.chat_template = "{% if messages[0].content == 'no' %}{{ raise_exception('not so') }}{% endif %}" + (
        "{% if messages[0].content == 'never' %}" + ROUNDS + "{% endif %}" + NAMESPACE
    )
    asked = [([{"role": "user", "content": text}], {"add_generation_prompt": True}) for text in ("a", "no", "b")]
    lines = []
    ask = template._WORKER._ask
    monkeypatch.setattr(template._WORKER, "_ask", lambda line, *more: (lines.append(line), ask(line, *more))[1])
    template.look_ahead(tokenizer, asked * 2)
    before = len(lines)
    assert [template.render_marked(tokenizer, *asked[at])[0].count("|>") for at in (2, 0)] == [3, 3]
    with pytest.raises(TemplateError, match="not so"):
        template.render_marked(tokenizer, *asked[1])
    assert len(lines) == before
    assert max(line.count(b"conversation") for line in lines) == 3  # each once

    hangs = [asked[0], ([{"role": "user", "content": "never"}], {})]
    template.look_ahead(tokenizer, hangs)
    assert template.render_marked(tokenizer, *hangs[0])[0].count("|>") == 3
    with pytest.raises(InputError, match="takes longer"):
        template.render_marked(tokenizer, *hangs[1])


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{% set x = cycler.__init__.__globals__.os.system('exit') %}",
        "{{ messages.append(1) }}",
        "{{ lipsum.__globals__ }}",
    ],
)
def test_python_is_out_of_reach(text, tokenizer):
    tokenizer.chat_template = text
    try:
        found = render_chat(tokenizer, MESSAGES)
    except TemplateError as error:
        found = str(error)
    assert found == "" or "unsafe" in found or "undefined" in found


def test_a_template_of_a_megabyte_is_refused(tokenizer):
    tokenizer.chat_template = "x" * 10**6
    with pytest.raises(InputError, match="1,000,000 characters"):
        render_chat(tokenizer, MESSAGES)


def test_what_a_template_may_read():
    assert may_read(PHI_4_MINI, "tools")
    assert not may_read(PHI_4_MINI, "tools", is_variable=True)
    assert not may_read(PHI_4_MINI, "tool_calls")
    assert may_read("{% if tools %}{{ tools }}{% endif %}", "tools", is_variable=True)
    for whole in ("{{ messages | tojson }}", "{% for m in messages %}{% for k, v in m.items() %}{{ v }}{% endfor %}"):
        assert may_read(whole, "tool_calls")
    uses = ("{{ m }}", "{{ m | string }}", "{{ m[key] }}", "{{ m ~ 'x' }}", "{% set n = m %}{{ n }}", "{{ f(m) }}")
    for whole in uses:
        assert may_read(f"{{% for m in messages %}}{whole}{{% endfor %}}", "tool_calls"), whole
    spelt = "{% for m in messages[1:] %}{% if m is mapping and 'b' in m %}{{ m['a'] + m.c }}{% endif %}{% endfor %}"
    assert not may_read(spelt, "tool_calls")
    assert may_read("{% broken", "tools", is_variable=True)
