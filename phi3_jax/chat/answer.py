"""`answer`: messages in, the answer's text out."""

from collections.abc import Mapping, Sequence

from phi3_jax.chat.prompt import chat_prompt, check_question, read_messages
from phi3_jax.data.chat import ChatTokenizer
from phi3_jax.data.formats import Reading, Turn
from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.generation.decode import check_loaded
from phi3_jax.generation.text import answer_prompts, answer_settings
from phi3_jax.lora import Lora
from phi3_jax.model.phi3 import Phi3ForCausalLM
from phi3_jax.system.errors import InputError
from phi3_jax.system.text import one_line

MAX_NEW_TOKENS = 256


def answer(
    model: Phi3ForCausalLM,
    tokenizer: Tokenizer,
    messages: str | Sequence[Mapping[str, object]],
    *,
    lora: Lora | None = None,
    system: str | None = None,
    tools: Sequence[Mapping[str, object]] | None = None,
    chat_template_kwargs: Mapping[str, object] | None = None,
    **settings: object,
) -> str:
    """What the model says to a conversation, as text.

    The checkpoint's chat template writes the prompt, and the answer ends with the turn. Without special tokens, without
    the end token, cut before a stop string.

    Args:
        model: The model.
        tokenizer: Its tokenizer, with the chat template.
        messages: What was said, `[{"role": "user", "content": …}, …]`, the message to answer last; or text, which the
            user says.
        lora: The adapter; default: the base answers.
        system: The system message, where the messages bring none.
        tools: Functions that the model may call, as the template takes them.
        chat_template_kwargs: What else the template gets.
        settings: Those of `GenerationConfig`, over the checkpoint's own; `max_new_tokens` is 256 where neither says
            one. temperature, top_k, top_p and min_p switch `do_sample` on.

    Raises:
        InputError: For messages that cannot be read or end with no question, for what the template has no place for or
            the model no room, and for settings that are unknown or out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> import phi3_jax as p3
        >>> from phi3_jax.demo import demo_path
        >>> model = p3.Phi3ForCausalLM.from_pretrained(demo_path("base"), dtype=jnp.float32)
        >>> tokenizer = p3.load_tokenizer(demo_path("base"))
        >>> messages = [{"role": "user", "content": "Where is my parcel?"}]
        >>> text = p3.answer(model, tokenizer, messages, max_new_tokens=8)
        >>> text == p3.answer(model, tokenizer, "Where is my parcel?", max_new_tokens=8)
        True
    """
    check_loaded(model, lora)
    said: object = messages
    if isinstance(messages, str):
        said = [{"role": "user", "content": messages}]
    elif isinstance(messages, Sequence):
        said = list(messages)
    reading = Reading()
    beside = {"tools": None if tools is None else list(tools), "chat_template_kwargs": chat_template_kwargs}
    conversation = read_messages(said, beside, "the messages", reading)
    turns = conversation.turns
    check_question(turns, "the messages")
    if system is not None:
        if turns[0].role == "system":
            raise InputError("system is given, and the messages begin with a system message; leave one of them out")
        turns = (Turn("system", system), *turns)
    chat = ChatTokenizer(tokenizer)
    if not chat.has_template:
        raise InputError("the tokenizer has no chat template; give generate the tokens of a text: tokenizer(text)")
    if settings.get("num_return_sequences") not in (None, 1):
        raise InputError("num_return_sequences asks for several answers, and answer gives one; call generate")
    chosen = answer_settings(
        model.config, tokenizer, {**settings, "num_return_sequences": 1}, max_new_tokens=MAX_NEW_TOKENS
    )
    prompt = chat_prompt(chat, turns, "the messages", conversation.given)
    [(_, found)] = answer_prompts(model, tokenizer, [prompt], lora=lora, settings=chosen)
    if reading.passed_over:
        print(one_line(f"the messages: passed over, since nothing reads it: {', '.join(reading.passed_over)}"))
    return found.text
