"""Evaluates on one device and on a mesh of simulated ones, for test_mesh.py: a process of its own."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from phi3_jax.config.sections import DataSection, ParallelSection
from phi3_jax.evaluate import evaluate

folder = Path(sys.argv[1])
found = {}
for mesh in json.loads(sys.argv[2]):
    results = evaluate(
        folder / "base",
        DataSection(train=str(folder / "chats.jsonl"), max_length=32),
        adapters={"adapter": folder / "adapter"},
        metrics="loss,exact_match",
        max_new_tokens=5,
        parallel=ParallelSection(*mesh),
        batch_size=2,
    )
    found["_".join(map(str, mesh))] = {
        name: [asdict(prediction) for prediction in rows] for name, rows in results.predictions.items()
    }
(folder / "found.json").write_text(json.dumps(found))
