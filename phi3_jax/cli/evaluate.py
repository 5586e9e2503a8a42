"""`phi3-jax evaluate`: loss, perplexity and token accuracy of a model on chats."""

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import get_args

from phi3_jax.cli.parser import Parser, add_model_arguments, load, positive
from phi3_jax.run_config import DataSection


def run(argv: Sequence[str]) -> None:
    choices = {field.name: get_args(field.type) for field in fields(DataSection)}
    parser = Parser("evaluate", "Loss, perplexity and token accuracy of a model on chats.")
    add_model_arguments(parser)
    parser.add_argument("--data", required=True, metavar="PATH", help="file, folder or hub dataset id")
    parser.add_argument("--split", default="train", help="split of a hub dataset (default: train)")
    parser.add_argument("--format", choices=choices["format"], default="auto", help="shape of the rows (default: auto)")
    parser.add_argument(
        "--loss-on", choices=choices["loss_on"], default="assistant", help="tokens that count (default: assistant)"
    )
    parser.add_argument("--max-length", type=positive, default=2048, metavar="N", help="longest row (default: 2048)")
    parser.add_argument("--max-rows", type=positive, metavar="N", help="only the first so many rows")
    parser.add_argument(
        "--batch-size", type=positive, default=4, metavar="N", help="rows in a forward pass (default: 4)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse(argv)
    data = DataSection(
        train=arguments.data,
        split=arguments.split,
        format=arguments.format,
        loss_on=arguments.loss_on,
        max_length=arguments.max_length,
        max_rows=arguments.max_rows,
        packing=False,
        shuffle=False,
    )
    loaded = load(arguments)

    import jax
    from flax import nnx

    from phi3_jax.data import eval_batches, prepare_data
    from phi3_jax.training.evaluation import evaluate_rows
    from phi3_jax.training.step import make_eval_step

    rows = prepare_data(data, loaded.tokenizer, seed=0).train
    pad_id = loaded.model.config.pad_token_id or 0
    batches = eval_batches(rows, data, batch_size=arguments.batch_size, pad_id=pad_id)
    graph, state = nnx.split(loaded.model)
    params = {"model": state, "lora": loaded.lora}
    nothing = jax.tree.map(lambda _: None, params)
    on_device = map(jax.device_put, batches)
    figures = evaluate_rows(make_eval_step(graph, loaded.model.dtype), params, nothing, on_device)
    if arguments.json:
        print(json.dumps({**figures, **asdict(rows.stats)}))
        return
    print(f"loss            {figures['eval_loss']:.4f}")
    print(f"perplexity      {figures['eval_perplexity']:.4f}")
    print(f"token accuracy  {figures['eval_token_accuracy']:.2%}")
    print(f"over {rows.stats.target_tokens:,} target tokens of {rows.stats.rows:,} rows")
