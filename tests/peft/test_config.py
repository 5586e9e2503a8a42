"""PEFT's adapter_config.json, both ways."""

import json
from dataclasses import replace

from phi3_jax import LoraConfig
from phi3_jax.peft.config import config_entries, read_adapter_config

RANKS = {"0.mlp.down_proj": 2}


def test_what_is_written_is_read(tmp_path):
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["down_proj"], use_rslora=True, rank_pattern=RANKS)
    entries = config_entries(replace(config, base_model_name_or_path="some/base"))
    assert (entries["peft_type"], entries["base_model_name_or_path"]) == ("LORA", "some/base")
    (tmp_path / "adapter_config.json").write_text(json.dumps(entries))
    read = read_adapter_config(tmp_path)
    assert (read.r, read.lora_alpha, read.use_rslora, dict(read.rank_pattern)) == (3, 5, True, RANKS)
