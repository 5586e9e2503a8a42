"""Every chat template that TRL has, beside transformers and the template's own training form."""

import copy
import json
import re
from pathlib import Path

import pytest

trl = pytest.importorskip("trl")

from phi3_jax.data.chat import ChatTokenizer  # noqa: E402
from phi3_jax.data.formats import read_row  # noqa: E402
from phi3_jax.system.errors import InputError  # noqa: E402
from tests.helpers.generated_rows import prepared  # noqa: E402
from tests.helpers.tokenizers import bytes_tokenizer  # noqa: E402

pytestmark = pytest.mark.slow

FOLDER = Path(trl.__file__).parent / "chat_templates"
# Those of models that see take contents in parts alone.
NAMES = sorted(
    path.stem for path in FOLDER.glob("*.jinja") if not re.match("idefics3|smolvlm|llava_next|lfm2_2_5_vl", path.stem)
)
TOKEN = re.compile(
    r"<\|[^|\s'\"<>{}]+\|>|<\|[a-zA-Z_]+>|<[a-zA-Z_]+\|>|<｜[^｜\s'\"]+｜>|</?think>|</?tool_call>|</?tool_response>"
    r"|<(?:start|end)_of_turn>|\[gMASK\]|<sop>"
)
EOS = {
    "llama3": "<|eot_id|>",
    "gptoss": "<|return|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "cohere": "<|END_OF_TURN_TOKEN|>",
}
EOS |= {"phi3": "<|endoftext|>", "glm": "<|endoftext|>", "gemma": "<eos>", "diffusion": "<eos>"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "DEF",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "DEF"}}},
        },
    }
]


def said(role, content=None, **more):
    words = {"user": "USER one", "assistant": "Answer", "system": "SYS brief", "tool": "TOOL 21"}
    return {"role": role, "content": words[role] if content is None else content, **more}


def call(*arguments, **more):
    calls = [{"id": "c", "type": "function", "function": {"name": "weather", "arguments": each}} for each in arguments]
    return said("assistant", "", tool_calls=calls, **more)


U, A, S, T = (said(role) for role in ("user", "assistant", "system", "tool"))
PARIS, OTHER = {"city": "Pa ris"}, {"city": 'Rö "m"', "days": 2}
ROWS = {
    "system": ([S, U, A, said("user", "USER b"), said("assistant", "two")], None),
    "blanks": ([said("user", "\n USER x "), said("assistant", " \n x\n "), U, said("assistant", "\n\ny")], None),
    "lines and signs": ([said("user", "USER\r\n日本 👩‍👩‍👧"), said("assistant", "a\r\nü\u2028.")], None),
    "digits": ([said("user", "1"), said("assistant", "1"), said("user", "1"), said("assistant", "2")], None),
    "reasoning": ([U, said("assistant", reasoning_content="why"), U, said("assistant", reasoning_content="so")], None),
    "in content": ([U, said("assistant", "<think>\nwhy\n</think>\n\nOne"), U, A], None),
    "two users": ([U, said("user", "USER b"), A], None),
    "tools": ([S, U, A], TOOLS),
    "call": ([U, call(PARIS), T, A], TOOLS),
    "text": ([S, U, call(json.dumps(PARIS)), T, A], TOOLS),
    "no arguments": ([U, call({}), T, A], TOOLS),
    "two calls": ([U, call(PARIS, OTHER), T, said("tool", "TOOL 22"), A], TOOLS),
    "rounds": ([U, call(PARIS), T, call(OTHER), T, A, said("user", "USER b"), call(PARIS)], TOOLS),
    "JSON": ([U, call(PARIS, reasoning_content="why"), said("tool", '{"TOOL": "é\\n"}'), A], TOOLS),
}


def tokenizer_of(name):
    text = (FOLDER / f"{name}.jinja").read_text()
    eos = next((eos for family, eos in EOS.items() if name.startswith(family)), "<|im_end|>")
    found = TOKEN.findall(re.sub(r"\{#.*?#\}", "", text, flags=re.S))
    tokens = dict.fromkeys(["<|endoftext|>", eos, "<s>", *found])
    tokenizer = bytes_tokenizer(text, [(token, "/" not in token and "think" not in token, False) for token in tokens])
    tokenizer.eos_token, tokenizer.bos_token = eos, "<s>"
    return tokenizer


def forms(messages):
    """The messages with the arguments of calls as they are, as objects and as text."""
    yield messages
    for form in (lambda text: json.loads(text) if isinstance(text, str) else text, json.dumps):
        changed = copy.deepcopy(messages)
        for message in changed:
            for each in message.get("tool_calls", ()):
                each["function"]["arguments"] = form(each["function"]["arguments"])
        yield changed


def applied(tokenizer, messages, tools, **options):
    """What transformers makes of each form that the template takes."""
    found = []
    for form in forms(messages):
        try:
            found.append(tokenizer.apply_chat_template(form, tools=tools, **options))
        except Exception:  # whatever a template raises
            continue
    return found


@pytest.mark.parametrize("name", NAMES)
def test_ids_targets_and_prompts(name):
    tokenizer = tokenizer_of(name)
    chat = ChatTokenizer(tokenizer)
    marks = "generation %}" in tokenizer.chat_template
    training = FOLDER / f"{name}_training.jinja"
    taken, refusals = 0, []
    for messages, tools in ROWS.values():
        row = {"messages": messages, **({"tools": tools} if tools else {})}
        try:
            [(ids, mask)], stats = prepared(chat, [row])
        except InputError as error:
            refusals.append(str(error))
            continue
        taken += 1
        assert not stats.literal_rows
        assert ids in applied(tokenizer, messages, tools, return_dict=False)
        targets = tokenizer.decode([each if target else 10 for each, target in zip(ids, mask, strict=True)])
        assert not re.search("USER|SYS|TOOL|DEF", targets)
        options = {"return_dict": True, "return_assistant_tokens_mask": True}
        text = training.read_text() if training.exists() else None
        for seen in applied(tokenizer, messages, tools, chat_template=text, **options) if marks or text else ():
            if seen["input_ids"] == ids:
                theirs = [0, *seen["assistant_masks"][1:]]
                more = {ids[at] for at, target in enumerate(mask) if target and not theirs[at]}
                # Gemma's models end a call with it.
                assert (mask == theirs) if marks else more <= {tokenizer.get_vocab().get("<|tool_response>")}
        asked = read_row({**row, "messages": messages[:-1]}, "row 1")
        prompt = chat.prompt(asked.turns, asked.given).tolist()
        assert prompt in applied(tokenizer, messages[:-1], tools, add_generation_prompt=True, return_dict=False)
    assert taken >= 3
    assert all(re.fullmatch(r"rows, row 1[:,].+", refusal) for refusal in refusals)
