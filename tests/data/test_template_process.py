"""The process that renders templates: an answer for every line, and nothing else on its output."""

import json
import subprocess
import sys


def test_texts_and_errors_come_back_as_lines():
    messages = [{"role": "user", "content": "hi"}]
    text = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    asked = [
        [0, text, [{"conversation": []}, {"conversation": messages}]],
        [1, "{{ raise_exception('not so') }}", [{"conversation": messages}]],
        [0, None, [{"conversation": messages}]],
    ]
    lines = "".join(json.dumps(line) + "\n" for line in asked)
    command = [sys.executable, "-m", "phi3_jax.data.template_process", str(2**33)]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        ["text", ""],
        ["text", "<hi>"],
        ["error", "not so"],
        ["text", "<hi>"],
    ]
