"""`phi3-jax generate`: one prompt, one answer."""

from collections.abc import Sequence

from phi3_jax.cli.parser import Parser, add_model_arguments, load, positive
from phi3_jax.errors import InputError


def run(argv: Sequence[str]) -> None:
    parser = Parser("generate", "Answer a prompt, each token the most likely one.")
    add_model_arguments(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what the user says")
    parser.add_argument("--raw", action="store_true", help="the prompt as it is, without the chat template")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=128, metavar="N", help="longest answer (default: 128)"
    )
    arguments = parser.parse(argv)
    loaded = load(arguments)
    tokenizer = loaded.tokenizer

    import jax.numpy as jnp

    from phi3_jax.data.chat import ChatTokenizer
    from phi3_jax.data.formats import Turn
    from phi3_jax.generation import generate
    from phi3_jax.training.evaluation import end_token_ids

    if arguments.raw:
        prompt = tokenizer(arguments.prompt)["input_ids"]
    elif tokenizer.chat_template is None:
        raise InputError(f"{arguments.model}: its tokenizer has no chat template; give --raw")
    else:
        prompt = ChatTokenizer(tokenizer).prompt((Turn("user", arguments.prompt),)).tolist()
    tokens = generate(
        loaded.model,
        jnp.asarray([prompt], jnp.int32),
        lora=loaded.lora,
        max_new_tokens=arguments.max_new_tokens,
        eos_token_id=end_token_ids(tokenizer, loaded.model.config),
    )
    print(tokenizer.decode([int(token) for token in tokens[0, len(prompt) :]], skip_special_tokens=True).strip("\n"))
