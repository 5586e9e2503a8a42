"""Loss, perplexity and token accuracy, held against a plain loop over transformers' model and PEFT's adapter."""

import json
import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from phi3_jax.evaluate import Results, evaluate  # noqa: E402
from tests.helpers.references import torch_phi3  # noqa: E402
from tests.helpers.rows import write_chats  # noqa: E402
from tests.helpers.tokenizers import tiny_tokenizer  # noqa: E402

# PEFT and transformers warn of their own names.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    model = torch_phi3(folder / "base", num_key_value_heads=2)
    tiny_tokenizer().save_pretrained(folder / "base")
    write_chats(folder / "chats.jsonl", number=40)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["qkv_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(folder / "adapter")
    return folder


def figures_of_a_loop(folder: Path, with_adapter: bool) -> dict[str, float]:
    """Row by row, the targets being the answer and the token that ends it."""
    model = torch_phi3(num_key_value_heads=2)
    if with_adapter:
        model = peft.PeftModel.from_pretrained(model, folder / "adapter").eval()
    tokenizer = tiny_tokenizer()
    loss = count = right = 0.0
    for line in (folder / "chats.jsonl").read_text().splitlines():
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = torch.tensor([prompt + tokenizer(messages[1]["content"] + "<|end|>")["input_ids"]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            out = model(input_ids=ids, labels=labels)
        targets = ids[0, len(prompt) :]
        loss += out.loss.double().item() * len(targets)
        right += (out.logits[0, len(prompt) - 1 : -1].argmax(-1) == targets).sum().item()
        count += len(targets)
    return {"loss": loss / count, "perplexity": math.exp(loss / count), "token_accuracy": right / count}


@pytest.fixture(scope="module")
def results(folder) -> Results:
    adapters = {"adapter": folder / "adapter"}
    return evaluate(folder / "base", folder / "chats.jsonl", adapters=adapters, batch_size=8)


@pytest.mark.parametrize("name", ["base", "adapter"])
def test_perplexity_is_that_of_a_transformers_loop(name, folder, results):
    expected = figures_of_a_loop(folder, name == "adapter")
    found = results.models[name]
    for figure in ("loss", "perplexity"):
        assert found[figure].value == pytest.approx(expected[figure], rel=1e-5)
    assert found["token_accuracy"].value == expected["token_accuracy"]
