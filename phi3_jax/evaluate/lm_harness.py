"""`Phi3JaxLM`: a model as lm-evaluation-harness wants it.

What decides a number is done as in the harness's own `HFLM`: where a BOS goes, what precedes an empty
context, which side is cut, and where an answer ends. So figures can be compared with published ones.
"""

import inspect
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol, Self, TypedDict, TypeVar, Unpack

import numpy as np
from jinja2.exceptions import TemplateError
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from phi3_jax.config.generation import GenerationConfig
from phi3_jax.config.hub_options import Hub
from phi3_jax.data.chat import ChatTokenizer
from phi3_jax.data.template import render_chat
from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.data.vocabulary import check_ids
from phi3_jax.evaluate.likelihood import Tokens, score_continuations
from phi3_jax.generation.decode import answers
from phi3_jax.generation.stop import StopStrings
from phi3_jax.lora import Lora
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.parallel.mesh import auto_dtype
from phi3_jax.peft.adapter import PeftAdapter
from phi3_jax.peft.base import open_base
from phi3_jax.system.errors import InputError
from phi3_jax.system.panic import telling_panics
from phi3_jax.system.text import shown

T = TypeVar("T")

logger = logging.getLogger(__name__)

Request = tuple[tuple[str, str] | None, Tokens, Tokens]  # texts (None: no entry in the cache), context, continuation


class Settings(TypedDict, total=False):
    """How `Phi3JaxLM` works, each as the class describes it."""

    batch_size: int | str
    max_length: int | None
    add_bos_token: bool | None
    prefix_token_id: int | None


class _Rolling(Protocol):
    """The harness's request for a text's log-probability."""

    args: tuple[str]


class _Generation(Protocol):
    """The harness's request for an answer to a context, and how to generate it."""

    args: tuple[str, Mapping[str, object]]


@register_model("phi3_jax")
class Phi3JaxLM(TemplateLM):
    """A model, its tokenizer and perhaps an adapter for `lm_eval.simple_evaluate(model=...)`.

    Args:
        model: As `Phi3ForCausalLM.from_pretrained` gives it; `Phi3JaxLM.from_pretrained` loads all three.
        tokenizer: As `load_tokenizer` gives it.
        lora: As `load_adapter` gives it.
        batch_size: Rows in a forward pass, and answers generated side by side.
        max_length: Longest row in tokens, prompt and answer together; default: the model's positions.
        add_bos_token: True puts the BOS before every text, False before none; default: as the tokenizer does.
        prefix_token_id: What an empty context becomes; default: the BOS, else the end token.

    Raises:
        InputError: A value is out of range.
    """

    def __init__(
        self,
        model: Phi3ForCausalLM,
        tokenizer: Tokenizer,
        *,
        lora: Lora | None = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
    ) -> None:
        super().__init__()
        positions = model.config.max_position_embeddings
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InputError(f"batch_size is {batch_size!r}, expected a whole number of at least 1")
        if max_length is not None and not 1 < max_length <= positions:
            raise InputError(f"max_length is {max_length}, expected 2 to {positions}, the model's positions")
        if add_bos_token and tokenizer.bos_token_id is None:
            raise InputError("add_bos_token is true, and the tokenizer has no BOS; leave it out")
        self.model = model
        self.tokenizer = tokenizer
        self.lora = lora
        self.batch_size = int(batch_size)
        self.max_length = max_length or positions
        self.add_bos_token = add_bos_token
        self._prefix_token_id = prefix_token_id

    @classmethod
    def from_pretrained(
        cls,
        pretrained: str | None = None,
        *,
        adapter: str | None = None,
        dtype: str = "auto",
        quantization: str | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        **settings: Unpack[Settings],
    ) -> Self:
        """Loads a checkpoint and an adapter: folders or hub ids.

        Args:
            pretrained: The checkpoint; None for the one that the adapter names.
            adapter: The adapter; None for the base alone.
            dtype: Of the weights; auto: bfloat16, on a CPU float32.
            quantization: `nf4` or `int8`, see `Phi3ForCausalLM.from_pretrained`.
            revision: Of the checkpoint on the hub; default: the one that the adapter was trained on.
            cache_dir: Where hub downloads are kept.
            local_files_only: Never ask the network.
            **settings: Those of the class.

        Raises:
            InputError: For what cannot be loaded, an adapter for another base among it.
        """
        hub = Hub(revision, cache_dir=cache_dir, local_files_only=local_files_only)
        opened = PeftAdapter.open(adapter, hub.at(None)) if adapter else None
        base = open_base(pretrained, [opened] if opened else [], hub)
        # Before the weights, which may take minutes.
        lora, tokenizer = opened.load(base.shapes, base) if opened else None, base.tokenizer
        model = base.load_model(dtype=auto_dtype(dtype), quantization=quantization)
        return cls(model, tokenizer, lora=lora, **settings)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, object] | None = None
    ) -> Self:
        """What the harness calls with its `model_args`: the arguments of `from_pretrained`.

        Of `additional_config` the batch size counts. Which device computes is JAX's matter
        (JAX_PLATFORMS), not the harness's, which always says one.

        Raises:
            InputError: For an unknown name, and without `pretrained` and `adapter`.
        """
        given = dict(arg_dict)
        if batch_size := (additional_config or {}).get("batch_size"):
            given.setdefault("batch_size", batch_size)
        signatures = (inspect.signature(function).parameters.values() for function in (cls.from_pretrained, cls))
        known = [p.name for p in itertools.chain(*signatures) if p.kind is not p.VAR_KEYWORD]
        known = [name for name in known if name not in ("model", "tokenizer", "lora")]
        for name in given:
            if name not in known:
                raise InputError(f"unknown model argument {name}; there are {', '.join(known)}")
        if "pretrained" not in given and not given.get("adapter"):
            raise InputError("model_args have no pretrained; give pretrained=FOLDER, or a hub id")
        texts = ("pretrained", "adapter", "revision", "cache_dir")
        paths = {name: str(given[name]) for name in texts if given.get(name) is not None}
        return cls.from_pretrained(**(given | paths))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, object] | None = None) -> Self:
        """The same for `pretrained=FOLDER,adapter=FOLDER,...`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # What the harness asks about the model and its tokens.

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        token = self.tokenizer.eos_token_id
        if token is None:
            raise InputError("the tokenizer has no end token, and the harness needs one; give a tokenizer with one")
        return token

    @property
    def prefix_token_id(self) -> int:
        """What an empty context becomes."""
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @cached_property
    def _chat(self) -> ChatTokenizer:
        return ChatTokenizer(self.tokenizer)

    @property
    def max_gen_toks(self) -> int:
        """Longest answer, where a task does not say."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """Part of the name of the harness's cache."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def get_model_info(self) -> dict[str, str]:
        """What the harness writes into its results beside the arguments."""
        return {"model_dtype": str(self.model.dtype)}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids; a text that begins with the BOS already gets no second one."""
        wanted = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            wanted = False
        return self._encode(string, wanted)

    def _encode(self, string: str, add_special_tokens: bool | None) -> list[int]:
        settings = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids = self._chat.ids(string)
        if ids is None:
            with telling_panics("a text of the task", self.tokenizer.backend_tokenizer, [string]):
                ids = self.tokenizer.encode(string, **settings)
        elif add_special_tokens is not False:
            ids = [*self.tokenizer.encode("", **settings), *ids]
        check_ids(ids, self.model.config.vocab_size, f"a text of the task ({shown(string)})", self.tokenizer)
        # Not every tokenizer.json says where the BOS goes that is asked for.
        bos = self.tokenizer.bos_token_id
        if self.add_bos_token and add_special_tokens and bos is not None and ids[:1] != [bos]:
            return [bos, *ids]
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text, up to the answer or, without `add_generation_prompt`, within its start.

        A system turn that the template refuses is left out, with a warning.
        """

        def apply(history: list[dict[str, str]]) -> str:
            # Control tokens in what a task says are text, as in training rows.
            guarded = [{**turn, "content": self._chat.guarded(turn["role"], turn["content"])} for turn in history]
            return render_chat(
                self.tokenizer,
                guarded,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        try:
            return apply(chat_history)
        except TemplateError as error:
            logger.warning("the chat template refuses the conversation (%s); trying without its system turn", error)
            return apply([turn for turn in chat_history if turn["role"] != "system"])

    # What the harness has it do.

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        excess = [len(context) + len(continuation) - self.max_length - 1 for context, continuation in pairs]
        self._warn_of_cut("requests", excess)
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        scored = score_continuations(
            self.model, pairs, lora=self.lora, batch_size=self.batch_size, max_length=self.max_length
        )
        for index, score in _progress(scored, len(pairs), "Running loglikelihood requests", disable_tqdm):
            scores[index] = (score.logprob, score.is_greedy)
            texts = requests[index][0]
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, scores[index])
        return scores

    def loglikelihood_rolling(self, requests: Sequence[_Rolling], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text, in windows of `max_length` that overlap by one token."""
        windows: list[Request] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            (string,) = request.args
            of_text = get_rolling_token_windows(
                self.tok_encode(string),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(None, *make_disjoint_window(window)) for window in of_text]
            owners += [index] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[_Generation], disable_tqdm: bool = False) -> list[str]:
        """The answers, cut at the first text of `until`; requests of equal settings share batches.

        Raises:
            InputError: A setting is unknown or out of range.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        answers = [""] * len(requests)
        finished = itertools.chain.from_iterable(
            self._generate([requests[index].args for index in indices], indices) for indices in groups.values()
        )
        for index, answer in _progress(finished, len(requests), "Running generate_until requests", disable_tqdm):
            answers[index] = answer
            self.cache_hook.add_partial("generate_until", requests[index].args, answer)
        return answers

    def _generate(
        self, pairs: Sequence[tuple[str, Mapping[str, object]]], indices: Sequence[int]
    ) -> Iterator[tuple[int, str]]:
        """Answers to contexts of one and the same settings, with their `indices`; the longest prompts come first."""
        settings, until = self._settings(pairs[0][1])
        new = settings.new_tokens(0, self.max_length)
        room = self.max_length - new
        if room < 1:
            raise InputError(
                f"max_gen_toks is {new}, which leaves no room for a prompt in "
                f"{self.max_length} tokens; give --gen_kwargs max_gen_toks=N with fewer"
            )
        prompts = [self._prompt(context) for context, _ in pairs]
        self._warn_of_cut("prompts", [len(prompt) - room for prompt in prompts])
        # The harness seeds numpy's generator. Repeats of a prompt shall differ.
        seeds = np.random.randint(2**31 - 1, size=len(prompts)) if settings.do_sample else np.zeros(len(prompts), int)
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        size = min(self.batch_size, len(order))
        for start in range(0, len(order), size):
            part = order[start : start + size]
            rows = part + [part[-1]] * (size - len(part))  # one shape, one compilation
            batch = settings.with_(seed=tuple(seeds[rows].tolist())) if settings.do_sample else settings
            texts = self._answer([prompts[row][-room:] for row in rows], batch, until)
            for row, text in zip(part, texts, strict=False):
                yield indices[row], text

    def _answer(self, prompts: Sequence[Tokens], settings: GenerationConfig, until: list[str]) -> list[str]:
        """The answers of one batch, each cut before the first text of `until`."""
        longest = max(map(len, prompts))
        mask = np.array([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], np.int32)
        input_ids = np.zeros_like(mask)
        input_ids[mask == 1] = np.concatenate(prompts)
        # Without the prompts: here what began in one ends no answer.
        stops = StopStrings(self.tokenizer, until, [()] * len(prompts))
        found = answers(self.model, input_ids, mask, self.lora, settings, self.tokenizer, stops)
        texts = []
        for tokens, length in zip(found.sequences[:, longest:], found.lengths, strict=True):
            text = self.tokenizer.decode(tokens[:length].tolist(), skip_special_tokens=True)
            texts.append(postprocess_generated_text(text, until, None))
        return texts

    def _prompt(self, context: str) -> list[int]:
        wanted = False if has_bos_prefix(context, self.tokenizer.bos_token) else self.add_bos_token
        return self._encode(context, wanted) or [self.prefix_token_id]

    def _settings(self, gen_kwargs: Mapping[str, object]) -> tuple[GenerationConfig, list[str]]:
        """What the harness's generation settings are called here, and the texts that end an answer."""
        kwargs: dict[str, object] = dict(normalize_gen_kwargs(dict(gen_kwargs), self.max_gen_toks))
        until = handle_stop_sequences(kwargs.pop("until"), eos=self.tokenizer.eos_token)
        max_new_tokens = kwargs.pop("max_gen_toks")
        if not kwargs["do_sample"]:
            kwargs.pop("temperature", None)
        for name in ("max_length", "eos_token_id", "stop_strings", "num_return_sequences", "seed"):
            if name in kwargs:
                raise InputError(f"generation_kwargs have {name}, which the harness leaves to max_gen_toks and until")
        settings = GenerationConfig.from_model(self.model.config, max_new_tokens=max_new_tokens, **kwargs)
        return settings, [text for text in until if text]

    def _warn_of_cut(self, what: str, excess: Sequence[int]) -> None:
        cut = [tokens for tokens in excess if tokens > 0]
        if cut:
            logger.warning(
                "%d of %d %s are too long for %d tokens and lose up to %d on the left",
                len(cut),
                len(excess),
                what,
                self.max_length,
                max(cut),
            )


def _progress(items: Iterable[T], total: int, what: str, disable: bool) -> Iterator[T]:
    yield from tqdm(items, total=total, desc=what, disable=disable)
