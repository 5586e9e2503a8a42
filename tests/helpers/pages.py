"""Reports to look at: of a run like the demo's, of an evaluation, and of the strangest strings."""

import math
from typing import Any

from phi3_jax.config.run import RunConfig
from phi3_jax.config.sections import DataSection, ModelSection, PeftSection

HOSTILE = (
    "</title></style></pre><script>alert('1')</script><img src=x onerror=\"alert(2)\">&lt;\x00\x1b\x9f\ud800\u202e"
)
LONG = "W" * 600

STATS = {
    "sources": ["folder/chats.jsonl"],
    "rows": 1500,
    "skipped": 2,
    "truncated": 30,
    "dropped_turns": 0,
    "tokens": 40_000,
    "target_tokens": 10_000,
    "longest": 4321,
    "packing_efficiency": 0.8,
    "lengths": {"edges": [10, 20, 30, 40], "counts": [300, 0, 1170]},
    "notices": ["30 rows lost their end"],
}


def run_report(name: str = "", answer: str = "") -> dict[str, Any]:
    """Arguments of `write_report`; `name` and `answer` stand in every place that a user's text reaches."""
    run = RunConfig(
        ModelSection(name or "hub/base-model"),
        PeftSection(target_modules=(name or "qkv_proj", "o_proj")),
        DataSection(train=name or "folder/chats.jsonl", columns={name or "prompt": name or "question"}),
    )
    steps = range(10, 190, 10)
    history: list[dict[str, Any]] = [
        {"step": s, "loss": 10 * math.exp(-s / 25) + 0.004, "learning_rate": 3e-3 * (1 - s / 200), "grad_norm": 5 / s}
        | {"tokens_per_second": 30_000.0 + s, "mfu": 0.4}
        for s in steps
    ]
    history += [{"step": s, "eval_loss": 11 * math.exp(-s / 20) + 0.01, "eval_token_accuracy": 0.9} for s in (0, 180)]
    sample = {"prompt": f"<|user|>12 red mugs to Oslo?{answer}<|end|>", "reference": f"item: mugs; count: 12{answer}"}
    return {
        "run_config": run.to_dict(),
        "history": history,
        "before": {
            "eval_loss": 11.3491,
            "eval_loss_interval": (11.1, 11.6),
            "eval_perplexity": 84891.8,
            "eval_token_accuracy": 0.268,
            "exact_match": 0.0,
            "exact_match_interval": (0.0, 0.018),
        },
        "after": {
            "eval_loss": 0.0098,
            "eval_loss_interval": (0.007, 0.012),
            "eval_loss_p_value": 0.0312,
            "eval_perplexity": 1.0098,
            "eval_token_accuracy": 0.998,
            "exact_match": 0.94,
            "exact_match_interval": (0.9, 0.97),
            "exact_match_p_value": 1e-5,
        },
        "samples": [
            {**sample, "before": f"Of course, mugs for Oslo.{answer}", "after": sample["reference"]},
            {**sample, "before": "Of course, 12 mugs.", "after": f"item: mugs; count: 21{answer}"},
        ]
        * 5,
        "data_stats": {"train": STATS, "eval": {**STATS, "truncated": 0}, **({name: {name: name}} if name else {})},
        "parameter_table": [(f"{name}model.layers.mlp.down_proj", 5767168), ("lm_head", 100)],
        "versions": {"jax": "0.10.2", name or "device": name or "cpu"},
        "command": f"phi3-jax train --config 'a b.yaml' {name}",
        "train_results": {"train_runtime": 245.2, "train_tokens": 351_732},
        "memory": {"host_peak_bytes": 3 * 2**30, "device_peak_bytes": None},
    }


def evaluation_report(name: str = "", answer: str = "", models: int = 3) -> dict[str, Any]:
    """Arguments of `write_evaluation_report`, of so many models."""
    columns = [f"{name}model-{index}" for index in range(models)]
    shares = [index / models for index in range(models)]
    return {
        "title": f"{models} models on {name or 'chats.jsonl'}",
        "columns": columns,
        "metrics": [
            {
                "name": "exact_match",
                "values": shares,
                "intervals": [(max(0.0, x - 0.1), x + 0.1) for x in shares],
                "p_values": [None, *[0.0004] * (models - 1)],
            },
            {"name": "loss", "values": [1.0 + x for x in shares]},
            {"name": f"{name}some_check", "values": [None, *shares[1:]]},
        ],
        "samples": [
            {
                "prompt": f"<|user|>{count} red mugs?{answer}<|end|>",
                "reference": f"mugs; {count}{answer}",
                "answers": [f"mugs; {index}{answer}" for index in range(models)],
            }
            for count in (12, 0)
        ],
        "command": f"phi3-jax evaluate {name}",
        "versions": {"jax": "0.10.2"},
    }
