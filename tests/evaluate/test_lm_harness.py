"""The door to lm-evaluation-harness, held against the harness's own class for transformers models."""

import copy
import importlib
import json
import logging
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval")
torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("accelerate")  # lm_eval's class imports it

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402
from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import phi3_jax  # noqa: E402
from phi3_jax import InputError, LoraConfig, Phi3ForCausalLM, init_lora, save_adapter  # noqa: E402
from phi3_jax.cli.lm_eval import run  # noqa: E402
from phi3_jax.data.chat import ChatTokenizer  # noqa: E402
from phi3_jax.data.formats import Turn  # noqa: E402
from phi3_jax.evaluate import lm_harness as harness_lm  # noqa: E402
from phi3_jax.generation.decode import answers  # noqa: E402
from phi3_jax.harness import Phi3JaxLM  # noqa: E402
from tests.helpers.checkpoints import OUTGROWN, OUTGROWN_ERROR  # noqa: E402
from tests.helpers.models import CONFIG, tiny_model  # noqa: E402
from tests.helpers.tokenizers import tiny_tokenizer  # noqa: E402

DEMO = Path(phi3_jax.__file__).parent / "demo"
BASE = str(DEMO / "base")
TASKS = ("orders_choice", "orders_answer", "orders_text")

CHOICE = """
task: orders_choice
output_type: multiple_choice
doc_to_text: "{{question}} How many pieces?"
doc_to_choice: "{{choices}}"
doc_to_target: 1
"""
ANSWER = """
task: orders_answer
output_type: generate_until
doc_to_text: "{{question}} How many pieces?"
doc_to_target: "{{choices[1]}}"
metric_list:
  - metric: exact_match
generation_kwargs:
  until: [".", "<|user|>"]
  max_gen_toks: 24
"""
TEXT = """
task: orders_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task of each kind, over the demo's order messages."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = (DEMO / "orders_eval.jsonl").read_text(encoding="utf-8").splitlines()[:10]
    messages = [[turn["content"] for turn in json.loads(line)["messages"]] for line in lines]
    questions = [question for question, _ in messages]
    counts = [int(answer.split("count: ")[1].split(";")[0]) for _, answer in messages]
    rows = [
        {
            "question": question,
            "choices": [f"The count is {number}" for number in (count + 1, count, 10 * count)],
            # The last text has more tokens than the model has positions.
            "text": question if index < 9 else " ".join(questions),
        }
        for index, (question, count) in enumerate(zip(questions, counts, strict=True))
    ]
    data = folder / "orders.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = (
        f"dataset_path: json\ntest_split: test\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data}\n  cache_dir: {folder / 'cache'}\n"
    )
    for name, text in zip(TASKS, (CHOICE, ANSWER, TEXT), strict=True):
        (folder / f"{name}.yaml").write_text(text + source, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    model = Phi3ForCausalLM.from_pretrained(BASE, dtype=jnp.float32)
    config = LoraConfig(r=4, lora_alpha=1, target_modules="all-linear", init_lora_weights=False)
    save_adapter(folder, init_lora(model, config, jax.random.key(0)), base_model_name_or_path=BASE)
    return folder


@pytest.fixture(scope="module")
def ours() -> Phi3JaxLM:
    return Phi3JaxLM.create_from_arg_string(
        f"pretrained={BASE},dtype=float32,max_length=96", {"batch_size": "4", "device": "cuda:0"}
    )


def evaluate(lm: Any, tasks: Path, **settings: Any) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The harness's figures, and the model's responses in the order of the rows."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    results = simple_evaluate(model=lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, **settings)
    samples = {
        name: [sample["resps"] for sample in sorted(rows, key=lambda sample: sample["doc_id"])]
        for name, rows in results["samples"].items()
    }
    return results["results"], samples


def assert_equal_runs(tasks: Path, ours: Phi3JaxLM, theirs: HFLM, **settings: Any) -> dict[str, Any]:
    figures, responses = evaluate(ours, tasks, **settings)
    expected_figures, expected = evaluate(theirs, tasks, **settings)
    for name in TASKS:
        for key, value in expected_figures[name].items():
            assert figures[name][key] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), key
    for row, expected_row in zip(responses["orders_choice"], expected["orders_choice"], strict=True):
        for ((logprob, greedy),), ((expected_logprob, expected_greedy),) in zip(row, expected_row, strict=True):
            assert logprob == pytest.approx(expected_logprob, abs=1e-4)
            assert greedy == expected_greedy
    np.testing.assert_allclose(
        np.array(responses["orders_text"]), np.array(expected["orders_text"]), atol=1e-4, rtol=1e-6
    )
    assert responses["orders_answer"] == expected["orders_answer"]
    return figures


def test_equal_to_the_harness_own_class(tasks: Path, ours: Phi3JaxLM) -> None:
    theirs = HFLM(BASE, device="cpu", dtype="float32", batch_size=4, max_length=96)
    figures = assert_equal_runs(tasks, ours, theirs, apply_chat_template=True)
    assert figures["orders_choice"]["acc,none"] > 0.8  # the demo's base knows the answers
    assert figures["orders_answer"]["exact_match,none"] > 0.5


def test_equal_with_an_adapter_and_without_template(tasks: Path, adapter: Path) -> None:
    ours = Phi3JaxLM.from_pretrained(BASE, adapter=str(adapter), dtype="float32", batch_size=3, max_length=96)
    theirs = HFLM(BASE, peft=str(adapter), device="cpu", dtype="float32", batch_size=3, max_length=96)
    assert_equal_runs(tasks, ours, theirs, system_instruction="Count.")


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": True}, {"prefix_token_id": 1020}], ids=str)
def test_requests_at_the_edges(settings: dict[str, Any], ours: Phi3JaxLM, caplog: pytest.LogCaptureFixture) -> None:
    """Empty contexts, blanks at the border, a BOS in the text, contexts that are too long, and shared rows."""
    long = "Please send 33 mango napkins to Tallinn. " * 20
    pairs = [
        ("", "Hello"),
        ("", "<s>Hello"),
        ("Send ", "12 kites"),
        ("<s>Send", " 12"),
        (long, "Thank you"),
        ("I like", " tea"),
    ]
    pairs += [("Say:", letter) for letter in [" A", " B", " C", " Dora"]]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    texts = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("", "<s>Send", long)]
    theirs = HFLM(BASE, device="cpu", dtype="float32", batch_size=4, max_length=96, **settings)
    # Theirs puts a BOS in front by itself where one is asked for.
    for tokenizer in (theirs.tokenizer, ours.tokenizer):
        mine = Phi3JaxLM(ours.model, tokenizer, batch_size=4, max_length=96, **settings)
        for text in ("Send", "<s>Send"):
            assert mine.tok_encode(text) == mine._prompt(text) == theirs.tok_encode(text)
    with caplog.at_level(logging.WARNING, logger="phi3_jax"):
        scores = mine.loglikelihood(requests, disable_tqdm=True)
    tokens = len(theirs.tok_encode(long + "Thank you"))
    assert [record.getMessage() for record in caplog.records if record.name.startswith("phi3_jax")] == [
        f"1 of 10 requests are too long for 96 tokens and lose up to {tokens - 97} on the left"
    ]
    for score, expected in zip(scores, theirs.loglikelihood(requests, disable_tqdm=True), strict=True):
        assert score == (pytest.approx(expected[0], abs=1e-4), expected[1])
    totals = mine.loglikelihood_rolling(texts, disable_tqdm=True)
    np.testing.assert_allclose(totals, theirs.loglikelihood_rolling(texts, disable_tqdm=True), atol=1e-4, rtol=1e-6)


def asked(count: int = 3) -> str:
    return f"<|user|>\nDear shop, {count} mango kites to Tallinn, please. How many pieces?<|end|>\n<|assistant|>\n"


def generation(gen_kwargs: dict[str, Any], *contexts: str) -> list[Instance]:
    return [Instance("generate_until", {}, (context, gen_kwargs), index) for index, context in enumerate(contexts)]


def test_where_answers_end(ours: Phi3JaxLM) -> None:
    requests = [
        *generation({"until": " is", "max_gen_toks": 12}, asked(), "Hello"),
        # What begins in the prompt ends nothing; what is a special token ends the answer and is not in it.
        *generation({"until": ["count is"], "max_gen_toks": 4}, asked(12) + "The count"),
        *generation({"until": ["<|end|>"], "max_new_tokens": 12, "temperature": 0.0}, asked(45), asked(7)),
        *generation({"max_gen_toks": 90}, asked(5)),  # a prompt that is cut
    ]
    assert ours.generate_until(generation({"max_gen_toks": 3}, "", "<s>"), disable_tqdm=True)[0]  # not a word to go on
    theirs = HFLM(BASE, device="cpu", dtype="float32", batch_size=1, max_length=96)
    expected = theirs.generate_until(requests, disable_tqdm=True)
    assert ours.generate_until(requests, disable_tqdm=True) == expected
    assert expected[0] == "The count"
    assert expected[2] == " is 12"


def test_sampling(ours: Phi3JaxLM) -> None:
    """Repeats of a request differ, a run with the same seed does not."""
    requests = generation({"do_sample": True, "temperature": 1.5, "top_p": 0.95, "max_gen_toks": 16}, *["Hello"] * 4)
    runs = []
    for seed in (1, 1, 2):
        np.random.seed(seed)
        runs.append(ours.generate_until(requests, disable_tqdm=True))
    assert len(set(runs[0])) == 4
    assert runs[0] == runs[1] != runs[2]


def test_control_tokens_in_what_a_task_says_are_text(ours: Phi3JaxLM) -> None:
    turns = [{"role": "user", "content": "Hi<|end|>!"}]
    end = ours.tokenizer.convert_tokens_to_ids("<|end|>")
    found = ours.tok_encode(ours.apply_chat_template(turns))
    assert found.count(end) == 1
    assert found == ChatTokenizer(ours.tokenizer).prompt([Turn("user", "Hi<|end|>!")]).tolist()
    turns = [{"role": "user", "content": "Hi!"}]
    theirs = ours.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert ours.tok_encode(ours.apply_chat_template(turns)) == theirs


def test_a_template_without_system_turns(ours: Phi3JaxLM, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = copy.deepcopy(ours.tokenizer)
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    lm = Phi3JaxLM(ours.model, tokenizer)
    turns = [{"role": "user", "content": "Hi!"}]
    with_system = [{"role": "system", "content": "Be brief."}, *turns]
    assert lm.apply_chat_template(turns) == ours.apply_chat_template(turns) == "<|user|>\nHi!<|end|>\n<|assistant|>\n"
    assert not caplog.records
    assert lm.apply_chat_template(with_system) == lm.apply_chat_template(turns) != ours.apply_chat_template(with_system)
    assert "no system" in caplog.text


@pytest.mark.parametrize(
    ("gen_kwargs", "message"),
    [
        ({"max_gen_toks": 96}, "max_gen_toks is 96, which leaves no room for a prompt in 96 tokens"),
        ({"temprature": 1.0}, "unknown generation setting 'temprature'; did you mean 'temperature'"),
        ({"max_length": 20}, "generation_kwargs have max_length"),
        ({"do_sample": True, "temperature": 0.0}, "temperature is 0.0, expected a number above 0"),
    ],
)
def test_refused_settings(ours: Phi3JaxLM, gen_kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ours.generate_until(generation(gen_kwargs, "Hello"), disable_tqdm=True)


def test_a_token_that_the_model_has_no_row_for_is_named() -> None:
    lm = Phi3JaxLM(tiny_model(1), tiny_tokenizer(OUTGROWN))
    text = "a<call>"
    requests = {
        "loglikelihood": Instance("loglikelihood", {}, ("a", text), 0),
        "loglikelihood_rolling": Instance("loglikelihood_rolling", {}, (text,), 0),
        "generate_until": generation({"max_gen_toks": 4}, text)[0],
    }
    for name, request in requests.items():
        with pytest.raises(InputError) as error:
            getattr(lm, name)([request], disable_tqdm=True)
        assert OUTGROWN_ERROR in str(error.value)
        assert str(error.value).startswith("a text of the task (")


def test_what_is_done_is_in_the_cache_when_a_run_breaks_off(ours: Phi3JaxLM, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    calls = iter([answers])
    lm = Phi3JaxLM(ours.model, ours.tokenizer, batch_size=2)
    lm.cache_hook.add_partial = lambda *entry: kept.append(entry)
    monkeypatch.setattr(harness_lm, "answers", lambda *args, **kwargs: next(calls)(*args, **kwargs))
    settings = {"until": ["."], "max_gen_toks": 8}
    requests = generation(settings, "Hello", asked(), asked(44))
    with pytest.raises(RuntimeError):  # a generator's StopIteration, as Python reports it
        lm.generate_until(requests, disable_tqdm=True)
    assert [(attr, request) for attr, request, _ in kept] == [
        ("generate_until", (asked(44), settings)),
        ("generate_until", (asked(), settings)),
    ]
    kept.clear()
    pair = Instance("loglikelihood", {}, ("I like", " tea"), 0)
    (score,) = lm.loglikelihood([pair], disable_tqdm=True)
    (total,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("Hello",), 0)], disable_tqdm=True)
    assert kept == [("loglikelihood", ("I like", " tea"), score), ("loglikelihood_rolling", ("Hello",), total)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("dtype=float32", "no pretrained"),
        (f"pretrained={BASE},peft=x", "unknown model argument peft"),
        (f"pretrained={BASE},batch_size=auto", "batch_size is 'auto', expected a whole number"),
        (f"pretrained={BASE},max_length=4096", "max_length is 4096, expected 2 to 512"),
        (f"pretrained={BASE},adapter={BASE}", "adapter_config.json"),
    ],
)
def test_refused_arguments(arguments: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Phi3JaxLM.create_from_arg_string(arguments)


def test_a_bos_that_the_tokenizer_does_not_have_is_refused() -> None:
    model = Phi3ForCausalLM(CONFIG, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="the tokenizer has no BOS; leave it out"):
        Phi3JaxLM(model, SimpleNamespace(bos_token_id=None), add_bos_token=True)


def test_says_how_to_install_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "phi3_jax.harness")
    with pytest.raises(InputError, match=r"pip install 'phi3_jax\[lm-eval\]'"):
        importlib.import_module("phi3_jax.harness")


def test_the_command_that_the_document_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[2]
    shown = re.findall(r"```yaml\n(.*?)```", (root / "docs" / "lm_eval.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "orders.yaml").write_text(shown[0], encoding="utf-8")
    monkeypatch.chdir(root)
    # The harness's own tasks, thousands of files that take seconds to find, are left out.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    options = ["--model", BASE, "--dtype", "float32", "--include_path", str(tmp_path)]
    arguments = ["--limit", "4", "--apply_chat_template", "--model_args", "max_length=128", "--output_path"]
    run([*options, "--tasks", "orders", *arguments, str(tmp_path / "out")])
    assert "|orders|" in capsys.readouterr().out
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text(encoding="utf-8"))
    assert results["results"]["orders"]["exact_match,none"] == 0
    assert results["config"]["model_args"] == {"max_length": 128, "pretrained": BASE, "dtype": "float32"}
    assert results["config"]["batch_size"] == "8"
    with pytest.raises(InputError, match="Tasks not found: ordres"):
        run([*options, "--tasks", "ordres"])
    with pytest.raises(InputError, match="unrecognized arguments: --taks"):
        run([*options, "--taks", "orders"])
    with pytest.raises(InputError, match="No tasks"):
        run(options)
