"""Every Python example on every page: its imports and names are there, and it runs."""

import ast
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

import phi3_jax as p3
from tests.helpers.page_commands import PAGES, ROOT

BASE = "phi3_jax/demo/base"
CHAT = {"messages": [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello to you."}]}


def blocks(page: Path) -> list[str]:
    found = re.findall(
        r"^( *)```python\b[^\n]*\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    return [textwrap.dedent(text) for _, text in found]


WITH_PYTHON = [page for page in PAGES if blocks(page)]
by_page = pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)


def test_there_are_examples():
    """Else pages that are written otherwise would pass unread."""
    assert sum(len(blocks(page)) for page in WITH_PYTHON) > 12


@by_page
def test_what_a_page_imports_and_calls_is_there(page):
    for block in blocks(page):
        tree = ast.parse(block)
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), page.name, "exec"), {})
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "p3":
                assert hasattr(p3, node.attr), node.attr


@pytest.mark.slow
@by_page
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    """One after the other, with what the page takes for given, and the demo's base in place of Phi-3."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "phi3_jax").symlink_to(ROOT / "phi3_jax")
    given = GIVEN.get(page.name, lambda folder, patch: {})(tmp_path, monkeypatch)
    names: dict[str, Any] = {}
    for block in blocks(page):
        names |= given
        block = block.replace("microsoft/Phi-3-mini-4k-instruct", BASE)
        exec(compile(block, page.name, "exec"), names)


# What each page's examples take for given.


def a_model(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    ids = jnp.asarray([[5, 9, 17, 3], [6, 1, 2, 44]])
    ones = jnp.ones_like(ids)
    model = p3.Phi3ForCausalLM.from_pretrained(BASE, dtype=jnp.float32)
    return {
        "jax": jax,
        "p3": p3,
        "model": model,
        "lora": p3.init_lora(model, p3.LoraConfig(r=2), jax.random.key(0)),
        "input_ids": ids,
        "batch": {"input_ids": ids, "positions": jnp.arange(4) * ones, "segment_ids": ones, "loss_mask": ones},
    }


def a_run(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    (folder / "chats.jsonl").write_text(json.dumps(CHAT))
    training = {"output_dir": "out", "max_steps": 1, "max_length": 64, "report_to": "none", "bf16": False}
    peft = {"r": 2, "target_modules": "all-linear"}
    first = {**training, "output_dir": "first"}
    run = p3.RunConfig.from_dicts(model=BASE, data={}, training_config=first, peft_config=peft)
    return {
        "p3": p3,
        "run": run,
        "training_config": training,
        "peft_config": peft,
        "dataset": [CHAT],
        "held_out": [CHAT],
    }


def an_evaluation(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    (folder / "test.jsonl").write_text(json.dumps(CHAT))
    (folder / "base").symlink_to(ROOT / BASE)
    an_adapter(folder)
    return {}


def an_adapter(folder: Path) -> None:
    import jax
    import jax.numpy as jnp

    model = p3.Phi3ForCausalLM.from_pretrained(str(ROOT / BASE), dtype=jnp.float32)
    p3.save_adapter(folder / "out/adapter", p3.init_lora(model, p3.LoraConfig(r=2), jax.random.key(0)))


def a_harness(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Its tasks are downloaded; what it is given is looked at in their place."""
    lm_eval = pytest.importorskip("lm_eval")
    an_adapter(folder)

    def simple_evaluate(*, model: Any, tasks: list[str], apply_chat_template: bool) -> dict[str, Any]:
        assert isinstance(model, lm_eval.api.model.LM)
        return {"results": tasks}

    patch.setattr(lm_eval, "simple_evaluate", simple_evaluate)
    return {}


def another_model(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    import jax.numpy as jnp
    from flax import nnx

    class Attention(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.embed = nnx.Embed(1000, 8, rngs=rngs)
            self.query, self.value = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 10, rngs=rngs)

        def __call__(self, ids: Any) -> Any:
            return self.value(self.query(self.embed(ids)))

    def loss(model: Any, batch: Any) -> Any:
        return jnp.mean(model(batch) ** 2)

    ids = jnp.asarray([[5, 9, 17]])
    return {"model": Attention(nnx.Rngs(0)), "loss": loss, "batch": ids, "batches": [ids, ids]}


GIVEN = {
    "README.md": a_model,
    "architecture.md": a_model,
    "configuration.md": a_run,
    "data.md": a_run,
    "evaluation.md": an_evaluation,
    "lm_eval.md": a_harness,
    "loralib.md": another_model,
}
