"""The sections of a run's configuration: a dataclass each, with the names of TRL, PEFT and transformers.

The `Attributes` of the docstrings are the command line's help texts. A section checks its own values when
it is made.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from phi3_jax.config.hub_options import Hub
from phi3_jax.config.lora import LoraConfig
from phi3_jax.config.profiled import profiled_steps
from phi3_jax.config.ranges import check_range
from phi3_jax.system.errors import InputError

# What `data.train` and `data.eval` say of rows that a program has given in memory.
TRAIN_IN_MEMORY, EVAL_IN_MEMORY = "train_dataset, in memory", "eval_dataset, in memory"
# What stands in front of the names of an evaluation's figures; behind it the set's own name, where it has one.
EVAL = "eval"


@dataclass(frozen=True)
class ModelSection:
    """The base model.

    Attributes:
        name_or_path: Checkpoint folder or hub id.
        dtype: Type of the base's weights in memory.
        attention: Attention kernel; auto chooses by device.
        quantization: What the linear layers of the base are kept in: nf4 (QLoRA) or int8, made dense layer by layer
            inside the step; null or none for dtype. Embeddings, norms and the output head stay in dtype.
        double_quant: Quantise the statistics of nf4 too.
        revision: Branch, tag or commit on the hub.
        cache_dir: Where hub downloads are kept (default: huggingface_hub's).
        local_files_only: Never ask the network.
    """

    name_or_path: str
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    attention: Literal["auto", "xla", "cudnn", "splash", "chunked"] = "auto"
    quantization: Literal["none", "nf4", "int8"] | None = None
    double_quant: bool = True
    revision: str | None = None
    cache_dir: str | None = None
    local_files_only: bool = False

    def __post_init__(self) -> None:
        if self.quantization == "none":  # another word for null
            object.__setattr__(self, "quantization", None)

    @property
    def hub(self) -> Hub:
        """How the hub is asked for this model."""
        return Hub(self.revision, cache_dir=self.cache_dir, local_files_only=self.local_files_only)


@dataclass(frozen=True)
class PeftSection(LoraConfig):
    """The adapter: the names of PEFT's LoraConfig.

    Attributes:
        init_from: Adapter folder to start from instead of fresh weights.
        full_finetuning: Train every weight of the model and no adapter.
    """

    init_from: str | None = None
    full_finetuning: bool = False


def _check_names(sets: dict[str, str]) -> None:
    """Raises `InputError` for sets of evaluation rows that could not be told apart, or that are none."""
    if not sets:
        raise InputError("data.eval is {}, expected a source, or names with a source each; leave it out")
    for name, source in sets.items():
        if not isinstance(name, str) or not name.isprintable() or name.strip() != name or not name:
            raise InputError(f"data.eval: {name!r} is no name for a set; give a word, which figures are called by")
        if not isinstance(source, str) or not source.strip():
            raise InputError(f"data.eval.{name} is {source!r}, expected a file, a folder or a hub dataset id")


@dataclass(frozen=True)
class DataSection:
    """Training and evaluation rows.

    Attributes:
        train: File (JSON, JSONL, Parquet, Arrow, CSV), folder of files, save_to_disk folder, or hub dataset id.
        eval: The same for evaluation, or several under names of yours, {chats: chats.jsonl, code: code.jsonl}, each of
            which gives eval_NAME_loss and its kin; or use eval_fraction.
        eval_fraction: Share of the training rows held out, drawn by training.seed, when eval is not given.
        split: Split to train on, where the source has several.
        eval_split: Split to evaluate on, of data.eval or, if that is not given, of data.train.
        dataset_config: Configuration (subset) of a hub dataset that has several.
        format: Shape of the rows; auto looks at the columns.
        columns: Which column plays which part, for example {prompt: question, completion: answer}.
        max_length: Positions in a row; longer conversations are cut (and counted). null cuts none; without packing.
        truncation_mode: What is kept of a longer row, its start or its end.
        packing: Several conversations in a row, each seeing itself alone.
        packing_strategy: Which share a row. best_fit packs all of them anew each epoch; bfd, bfd_split and wrapped make
            the rows of TRL's pack_dataset, once. bfd_split goes on with the rest of a longer row in another, and
            wrapped cuts everything, end to end, into rows without padding, whose conversations see each other.
        eval_packing: The same as packing for evaluation rows, where that differs.
        shuffle: New order every epoch.
        template: How prompt and completion become a row where they are strings. auto renders them as a chat, but for
            those that hold the template's control tokens already; none takes all as they are, with nothing in between
            and the end token behind them, as TRL does.
        loss_on: Tokens that are trained on; the assistant's turns, the last one alone, or all. completion is TRL's way
            where a script says nothing: the completion of rows that are prompt and completion, all of others.
        final_eos: Train also the end token that a template writes behind the last turn, and give it to text without
            one, as TRL does.
        literal_roles: Whose texts hold no control tokens, whatever they look like. Those that open and close turns are
            text in everybody's.
        ignore_keys: Columns, and keys of turns, to pass over that would be an error otherwise.
        skip_empty: Leave out, and count, rows with nothing to train on, instead of stopping at the first.
        skip_invalid: Leave out, count and list rows with any fault, instead of stopping at the first.
        max_rows: Use only the first so many rows of each.
        cache: Keep prepared rows beside the hub's cache, for the next run with the same rows and settings.
        streaming: Read, render and pack training rows while it trains, in constant memory; needs training.max_steps.
        shuffle_buffer_size: Rows that wait to be drawn from, where data.streaming is true.
    """

    train: str | None = None
    eval: dict[str, str] | str | None = None
    eval_fraction: float = 0.0
    split: str = "train"
    eval_split: str | None = None
    dataset_config: str | None = None
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "tokens"] = "auto"
    columns: dict[str, str] | None = None
    max_length: int | None = 2048
    truncation_mode: Literal["keep_start", "keep_end"] = "keep_start"
    packing: bool = True
    packing_strategy: Literal["best_fit", "bfd", "bfd_split", "wrapped"] = "best_fit"
    eval_packing: bool | None = None
    shuffle: bool = True
    template: Literal["auto", "none"] = "auto"
    loss_on: Literal["assistant", "all", "last", "completion"] = "assistant"
    final_eos: bool = False
    literal_roles: list[Literal["system", "user", "assistant", "tool"]] = field(
        default_factory=lambda: ["user", "tool"]
    )
    ignore_keys: list[str] = field(default_factory=list)
    skip_empty: bool = False
    skip_invalid: bool = False
    max_rows: int | None = None
    cache: bool = True
    streaming: bool = False
    shuffle_buffer_size: int = 10_000

    def __post_init__(self) -> None:
        check_range("data", self, "eval_fraction", low=0, below=1)
        check_range("data", self, "max_length", low=2)
        check_range("data", self, "max_rows", low=1)
        check_range("data", self, "shuffle_buffer_size", low=1)
        if not (self.streaming and self.shuffle) and self.shuffle_buffer_size != type(self).shuffle_buffer_size:
            raise InputError(
                f"data.shuffle_buffer_size is {self.shuffle_buffer_size}, but only rows that are streamed and shuffled "
                "pass through a buffer; set data.streaming true, or leave it out"
            )
        if isinstance(self.eval, dict):
            _check_names(self.eval)
        self._check_packing()
        if self.streaming and self.eval_fraction:
            raise InputError(
                f"data.eval_fraction is {self.eval_fraction}, but of rows that are streamed no share can be drawn "
                "beforehand; give data.eval"
            )

    def _check_packing(self) -> None:
        packed = next((name for name in ("packing", "eval_packing") if getattr(self, name)), None)
        if self.max_length is None and packed:
            raise InputError(
                f"data.max_length is null, but data.{packed} fills sequences of so many positions; give a number, or "
                f"set data.{packed} false"
            )
        if self.max_length is None and self.streaming:
            raise InputError(
                "data.max_length is null, but of rows that are streamed nobody knows beforehand how long they are; "
                "give a number"
            )
        if packed and self.packs_as_trl and self.truncation_mode != "keep_start":
            raise InputError(
                f"data.truncation_mode is {self.truncation_mode}, but data.packing_strategy {self.packing_strategy} "
                "never looks at it, here as in TRL; leave it out, or give packing_strategy best_fit"
            )
        if self.streaming and self.packing and self.packs_as_trl:
            raise InputError(
                f"data.packing_strategy is {self.packing_strategy}, but rows that are streamed are packed while they "
                "come; give best_fit"
            )

    @property
    def packs_as_trl(self) -> bool:
        """Whether packed rows are those of TRL's `pack_dataset`."""
        return self.packing_strategy != "best_fit"

    @property
    def cuts(self) -> bool:
        """Whether rows are cut at `max_length`, each by itself."""
        is_split = self.packing and self.packing_strategy in ("bfd_split", "wrapped")
        return self.max_length is not None and not is_split

    @property
    def limit(self) -> int:
        """`max_length`, for what has to know it.

        Raises:
            InputError: Where it is null.
        """
        if self.max_length is None:
            raise InputError(
                "data.max_length is null, so that rows are as long as they are, and nobody knows beforehand how long; "
                "give a number for this"
            )
        return self.max_length

    @property
    def evaluation(self) -> "DataSection":
        """The section for evaluation rows."""
        return self if self.eval_packing is None else replace(self, packing=self.eval_packing, eval_packing=None)

    def require_train(self) -> str:
        """`train`. Raises `InputError` where it is not set."""
        if self.train is None:
            raise InputError("data.train is not set; name a file, a folder or a hub dataset id to train on")
        return self.train

    @property
    def has_eval(self) -> bool:
        """Whether there are evaluation rows."""
        return self.eval is not None or self.eval_split is not None or self.eval_fraction > 0

    @property
    def eval_sources(self) -> dict[str, str | None]:
        """Where evaluation rows are from, by what stands in front of the names of their figures; None: as of `train`.

        Example:
            >>> DataSection(eval={"chats": "chats.jsonl"}).eval_sources
            {'eval_chats': 'chats.jsonl'}
            >>> DataSection(eval_split="test").eval_sources
            {'eval': None}
        """
        if isinstance(self.eval, dict):
            return {f"{EVAL}_{name}": source for name, source in self.eval.items()}
        return {EVAL: self.eval} if self.has_eval else {}

    @property
    def in_memory(self) -> bool:
        """Whether any rows are given by a program."""
        return self.train == TRAIN_IN_MEMORY or EVAL_IN_MEMORY in self.eval_sources.values()


@dataclass(frozen=True)
class ParallelSection:
    """Devices along each axis of the mesh; -1 for one of them stands for all that the others leave. `auto` in place of
    the section chooses them.

    Attributes:
        data: Copies of the model, each with its own rows.
        fsdp: Devices that share one copy's weights, each with its own rows.
        tensor: Devices that share each matrix product.
        context: Devices that share each row's positions.
        axes: auto takes all devices: copies (data) where the base and its rows fit on one, else the fewest devices that
            share a copy (fsdp), and rows too where it must be (context), by plan's estimate.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    axes: Literal["given", "auto"] = "given"

    @property
    def sizes(self) -> dict[str, int]:
        """The axes that are given.

        Raises:
            InputError: They are still to be chosen.
        """
        if self.axes == "auto":
            raise InputError(
                "parallel is auto, which phi3-jax train, plan and benchmark choose by the devices; in Python give "
                "phi3_jax.performance.here.with_axes(run), or the axes"
            )
        return self._sizes()

    def _sizes(self) -> dict[str, int]:
        return {name: value for name, value in asdict(self).items() if name != "axes"}

    def __post_init__(self) -> None:
        sizes = self._sizes()
        if self.axes == "auto":
            for name, value in sizes.items():
                if value != 1:
                    raise InputError(f"parallel.axes is auto, but parallel.{name} is {value}; leave one out")
        for name, value in sizes.items():
            if value < 1 and value != -1:
                raise InputError(f"parallel.{name} is {value}, expected at least 1, or -1 for all devices left")
        rest = [name for name, value in sizes.items() if value == -1]
        if len(rest) > 1:
            raise InputError(f"parallel.{' and parallel.'.join(rest)} are -1; only one axis can take what is left")


@dataclass(frozen=True)
class LoggingSection:
    """What is written beside metrics.jsonl.

    Attributes:
        tensorboard: Write TensorBoard event files under output_dir/tensorboard.
        wandb: Log to Weights & Biases (needs the wandb package).
        wandb_project: Its project.
        run_name: Its run name.
        progress: Show a progress bar on the console.
        verbosity: What is said on the console. verbose adds every step that takes time; quiet
            leaves results, warnings and errors.
        profile: Steps to record for XProf and Perfetto, with the memory in use, under output_dir/profile: 10:13 for
            steps 10 to 12.
    """

    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "phi3_jax"
    run_name: str | None = None
    progress: bool = True
    verbosity: Literal["quiet", "normal", "verbose"] = "normal"
    profile: str | None = None

    def __post_init__(self) -> None:
        if self.profile is not None:
            profiled_steps(self.profile)

    @property
    def profiled_steps(self) -> range | None:
        """The steps that `profile` names, counted from 1."""
        return None if self.profile is None else profiled_steps(self.profile)
