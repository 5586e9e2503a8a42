"""The stages, in their order: what says whether it is right comes first, then how fast it is, then others."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax

from accelerator_check import attention, compared, peers, speed
from accelerator_check.record import Recorder
from accelerator_check.sizes import Sizes


@dataclass(frozen=True)
class Workplace:
    """What a stage is given.

    Attributes:
        sizes: How large everything is.
        folder: Where stages leave what others read.
        recorder: Takes what is found.
    """

    sizes: Sizes
    folder: Path
    recorder: Recorder


@dataclass(frozen=True)
class Stage:
    """One of them, which runs in a process of its own.

    Attributes:
        name: Its name.
        seconds: That it may take.
        work: What it does.
        on_cpu: Whether JAX is to see the CPU alone.
        is_peer: Whether it is about other programs, which may be absent.
    """

    name: str
    seconds: int
    work: Callable[[Workplace], None]
    on_cpu: bool = False
    is_peer: bool = False


def _train(place: Workplace, longer: int = 1, quantization: str | None = None) -> None:
    speed.time_training(place.sizes, place.recorder, longer=longer, quantization=quantization)


def _peft(place: Workplace, compiled: bool) -> None:
    peers.time_peft(place.sizes, place.recorder, jax.default_backend(), compiled=compiled)


def _answers(place: Workplace, batch: int) -> None:
    peers.time_transformers(place.sizes, place.recorder, jax.default_backend(), batch=batch)


STAGES = (
    Stage("device", 60, lambda place: speed.look_at_device(place.sizes, place.recorder)),
    Stage("attention", 120, lambda place: attention.check_attention(place.sizes, place.recorder)),
    Stage(
        "reference", 150, lambda place: compared.write_reference(place.sizes, place.folder, place.recorder), on_cpu=True
    ),
    Stage("model", 120, lambda place: compared.check_model(place.sizes, place.folder, place.recorder)),
    Stage("train", 120, _train),
    Stage("train QLoRA", 150, partial(_train, quantization="nf4")),
    Stage("decode", 60, lambda place: speed.time_decoding(place.sizes, place.recorder, batch=1)),
    Stage("decode 16", 60, lambda place: speed.time_decoding(place.sizes, place.recorder, batch=16)),
    Stage("train twice as long", 120, partial(_train, longer=2)),
    Stage("PEFT", 90, partial(_peft, compiled=False), is_peer=True),
    Stage("transformers decode", 60, partial(_answers, batch=1), is_peer=True),
    Stage("transformers decode 16", 60, partial(_answers, batch=16), is_peer=True),
    Stage("PEFT compiled", 150, partial(_peft, compiled=True), is_peer=True),
)


def stage_named(name: str) -> Stage:
    """The stage of that name."""
    return next(stage for stage in STAGES if stage.name == name)
