"""`phi3-jax info`: what is said of models, adapters and outputs, and of what is wrong with them."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from phi3_jax import InputError
from phi3_jax.hf.info import checkpoint_info, print_info
from tests.helpers.checkpoints import RAW, model_of

ADAPTER = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["qkv_proj"],
    "base_model_name_or_path": "some/base",
}


def add_adapter(folder, config=ADAPTER):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {"a": np.zeros((4, 32), np.float32), "b": np.zeros((64, 4), np.float32)}, folder / "adapter_model.safetensors"
    )


class TestReleased:
    @pytest.mark.parametrize(
        ("name", "total"),
        [
            ("phi-3-mini-4k-instruct", 3_821_079_552),  # as in its safetensors index, in bytes: 7,642,159,104
            ("phi-3-medium-128k-instruct", 13_960_238_080),
            ("phi-4-mini-instruct", 3_836_021_760),  # tied: no lm_head of its own
        ],
    )
    def test_parameters_from_the_config_alone(self, testdata, tmp_path, name, total):
        (tmp_path / "config.json").write_bytes((testdata / "models" / name / "config.json").read_bytes())
        info = checkpoint_info(tmp_path)
        assert info["parameters"] == sum(info["parameters_by_module"].values()) == total
        assert ("lm_head" in info["parameters_by_module"]) == (name != "phi-4-mini-instruct")
        assert info["weights"] is info["tokenizer"] is info["chat_template"] is None
        assert info["adapters"] == []

    def test_a_trained_model(self, testdata, capsys):
        info = checkpoint_info(testdata / "checkpoints" / "stories260K")
        assert info["weights"]["dtypes"] == {"float32": 33}
        assert info["tokenizer"]["tokens"] == 512
        print_info(info)
        assert "33 tensors of float32" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("name", "bos", "system"), [("phi-3-mini-4k-instruct", True, False), ("phi-3.5-mini-instruct", False, True)]
    )
    def test_templates_and_tokenizers(self, testdata, name, bos, system, capsys):
        info = checkpoint_info(testdata / "models" / name)
        assert info["chat_template"]["starts_with_bos"] is bos
        assert info["chat_template"]["mentions_system"] is system
        assert info["tokenizer"]["tokens"] == 32011
        assert info["config"]["vocab_size"] == 32064
        assert info["weights"] is None  # an index, but none of its files
        print_info(info)
        printed = capsys.readouterr().out
        assert "3,821,079,552" in printed
        assert "weights: none" in printed

    def test_what_of_an_adapter_differs_by_module(self, tmp_path, capsys):
        add_adapter(
            tmp_path, {**ADAPTER, "rank_pattern": {"o_proj": 3}, "modules_to_save": ["lm_head"], "alpha_pattern": {}}
        )
        print_info(checkpoint_info(tmp_path))
        printed = capsys.readouterr().out
        assert "o_proj: 3" in printed
        assert "lm_head" in printed
        assert "alpha_pattern" not in printed
        assert "2 tensors of float32" in printed

    def test_a_real_adapter_without_weights(self, testdata, capsys):
        info = checkpoint_info(testdata / "adapters" / "phi-3-mini-4k_r16_all-fused")
        (adapter,) = info["adapters"]
        assert (adapter["r"], adapter["lora_alpha"], adapter["trainable_parameters"]) == (16, 32, None)
        assert adapter["base_model_name_or_path"] == "microsoft/Phi-3-mini-4k-instruct"
        print_info(info)
        assert "gate_up_proj" in capsys.readouterr().out


class TestFolders:
    def test_a_model_with_adapters_beside_and_below(self, tmp_path, capsys):
        model_of(dtype="bfloat16").save_pretrained(str(tmp_path))
        add_adapter(tmp_path)
        add_adapter(tmp_path / "adapter", ADAPTER | {"r": 2})
        info = json.loads(json.dumps(checkpoint_info(tmp_path)))
        assert [adapter["r"] for adapter in info["adapters"]] == [4, 2]
        assert info["adapters"][0]["trainable_parameters"] == 4 * 32 + 64 * 4
        assert info["adapters"][0]["dtypes"] == {"float32": 2}
        assert info["weights"]["dtypes"] == {"bfloat16": 21}
        print_info(info)
        printed = capsys.readouterr().out
        assert "384" in printed
        assert "chat template: none" in printed

    def test_nothing_that_is_shown_steers_the_terminal(self, tmp_path, capsys):
        hostile = "\x1b]0;title\x07\x1b[2J\x9b31m\u202egnp.exe\ud800\nforged: line"
        folder = tmp_path / "adapter\x1b[31m"
        add_adapter(folder, ADAPTER | {"target_modules": [hostile], "base_model_name_or_path": hostile})
        (tmp_path / "config.json").write_text(json.dumps(RAW))
        (tmp_path / "chat_template.jinja").write_text("\x1b[31m{{ messages }}")
        print_info(checkpoint_info(tmp_path))
        printed = capsys.readouterr().out
        assert all(line.isprintable() for line in printed.split("\n"))
        assert "\nforged" not in printed
        assert r"\x1b]0;title\x07\x1b[2J\x9b31m\u202egnp.exe\ud800 forged: line" in printed

    def test_an_empty_template_is_one(self, tmp_path, capsys):
        (tmp_path / "config.json").write_text(json.dumps(RAW))
        (tmp_path / "chat_template.jinja").write_text("")
        print_info(checkpoint_info(tmp_path))
        assert "chat template: 0 characters" in capsys.readouterr().out

    def test_a_runs_output_folder(self, tmp_path):
        add_adapter(tmp_path / "adapter")
        info = checkpoint_info(tmp_path)
        assert info["config"] is None
        assert len(info["adapters"]) == 1

    def test_weights_that_cannot_be_loaded(self, tmp_path):
        model_of().save_pretrained(str(tmp_path))
        (tmp_path / "config.json").write_text(json.dumps(RAW | {"num_hidden_layers": 4}))
        with pytest.raises(InputError, match=r"6 missing tensors \(model.layers.3."):
            checkpoint_info(tmp_path)
        (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
        with pytest.raises(InputError, match="pickles"):
            checkpoint_info(tmp_path)

    def test_chat_template_file_goes_first(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps(RAW))
        (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "old"}')
        assert checkpoint_info(tmp_path)["chat_template"]["text"] == "old"
        (tmp_path / "chat_template.jinja").write_text("new")
        assert checkpoint_info(tmp_path)["chat_template"]["text"] == "new"

    def test_broken_tokenizer_is_told(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps(RAW))
        (tmp_path / "tokenizer.json").write_text("{")
        assert "cannot be read" in checkpoint_info(tmp_path)["tokenizer"]["problem"]

    @pytest.mark.parametrize("text", ["{", "[]"])
    def test_nothing_to_say(self, tmp_path, text):
        with pytest.raises(InputError, match="no adapter in it"):
            checkpoint_info(tmp_path)
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(InputError, match=r"adapter_config\.json"):
            checkpoint_info(tmp_path)
