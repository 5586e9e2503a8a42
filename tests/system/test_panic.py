"""Panics of the tokenizers library: told in one line, and nobody's output is lost for that."""

import json
import subprocess
import sys

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from phi3_jax.cli.prompts import Prompt, prompt_tokens
from phi3_jax.config.sections import DataSection
from phi3_jax.data.formats import Turn
from phi3_jax.data.prepare import prepare_data
from phi3_jax.system import panic
from phi3_jax.system.errors import InputError
from phi3_jax.system.panic import may_panic, telling_panics

GPT_4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENDLESS = "a" * 40 + "b"

# Two threads print while the third has rows tokenised, by a tokenizer that is tried in another process, or not.
PRINTING = """
import os, sys, threading, time
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from phi3_jax.data.chat import ChatTokenizer
from phi3_jax.data.spans import Rendered

backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
backend.pre_tokenizer = pre_tokenizers.Split(Regex(sys.argv[1]), "isolated") if sys.argv[1] else None
chat = ChatTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
over = threading.Event()
counts = {1: 0, 2: 0}

def tell(descriptor):
    while not over.is_set():
        os.write(descriptor, b"line %06d\\n" % counts[descriptor])
        counts[descriptor] += 1
        time.sleep(0.0005)

threads = [threading.Thread(target=tell, args=[descriptor]) for descriptor in counts]
for thread in threads:
    thread.start()
for number in range(5):
    os.write(1, b"main %d\\n" % number)
    chat.encode([Rendered(f"row {row}", "a b " * 200, ()) for row in range(50)])
over.set()
for thread in threads:
    thread.join()
print("counts", counts[1], counts[2])
"""


def tokenizer(expression=None):
    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    if expression is not None:
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(expression), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("expression", ["", "b+"], ids=["of a plain tokenizer", "of one that is tried"])
def test_what_other_threads_print_while_rows_are_tokenised_is_not_lost(expression):
    program = [sys.executable, "-c", PRINTING, expression]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    out, err = done.stdout.splitlines(), done.stderr.splitlines()
    _, *counts = out.pop().split()
    assert [line for line in out if line.startswith("main")] == [f"main {number}" for number in range(5)]
    for lines, count in zip((out, err), counts, strict=True):
        assert [line for line in lines if line.startswith("line")] == [f"line {n:06d}" for n in range(int(count))]


def test_a_tokenizer_that_panics_is_told_in_one_line(tmp_path, capfd):
    """Expressions in tokenizer.json that go back too often end in a panic of the library, which is no `Exception`."""
    broken = tokenizer("(a|a)*$")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": ENDLESS, "completion": "c"}) + "\n")
    with pytest.raises(InputError, match=r"rows\.jsonl, row 1: the tokenizer gives up \(.*retry-limit") as caught:
        prepare_data(DataSection(train=str(tmp_path / "rows.jsonl")), broken, seed=0)
    assert "\n" not in str(caught.value)
    prompt = Prompt("--prompt", {"prompt": ENDLESS}, (Turn("user", ENDLESS),))
    with pytest.raises(InputError, match="--prompt: the tokenizer gives up"):
        prompt_tokens(prompt, broken, None, None)
    assert capfd.readouterr() == ("", "")  # of the library, past Python


def test_a_panic_that_nobody_foresaw_is_told_in_one_line(monkeypatch, capfd):
    monkeypatch.setattr(panic, "may_panic", lambda tokenizer: False)
    backend = tokenizer("(a|a)*$").backend_tokenizer
    with pytest.raises(InputError, match="^row 7: the tokenizer gives up"), telling_panics("row 7", backend, []):
        backend.encode(ENDLESS)
    assert "panicked" in capfd.readouterr().err


def test_other_errors_are_not_taken_for_panics():
    with pytest.raises(KeyError), telling_panics("x", tokenizer().backend_tokenizer, []):
        raise KeyError
    with pytest.raises(TypeError), telling_panics("x", tokenizer("b+").backend_tokenizer, [3]):  # nor in the trial
        raise TypeError


def test_a_trial_whose_process_is_ended_counts_as_a_panic(monkeypatch):
    monkeypatch.setattr(panic.sys, "executable", "/bin/false")
    with pytest.raises(InputError, match=r"gives up \(its process ended with status 1\)"):
        telling_panics("x", tokenizer("b+").backend_tokenizer, ["a"]).__enter__()


@pytest.mark.parametrize("expression", [None, GPT_4, GPT_4O], ids=["none", "cl100k_base", "o200k_base"])
def test_tokenizers_of_phi_need_no_trial(expression):
    assert not may_panic(tokenizer(expression).backend_tokenizer)


def test_any_other_expression_is_found_wherever_it_stands():
    backend = tokenizer().backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(GPT_4), "isolated")])
    assert not may_panic(backend)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(GPT_4), "isolated"), pre_tokenizers.Split(Regex("(a|a)*"), "isolated")]
    )
    assert may_panic(backend)
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Replace(Regex("a"), "b")])
    assert may_panic(backend)
