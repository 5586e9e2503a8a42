"""SIGTERM and SIGINT: the wish that a run end soon, which it does at a place from which it can go on."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from phi3_jax.system.compat_jax import distributed_state

Handler = Callable[[int, FrameType | None], object] | int | None  # as `signal.signal` has them


class Stopped(Exception):
    """Raised where a run ends before its time, to be saved as it is."""


class StopSignals:
    """Listens to SIGTERM and SIGINT within a `with` block; a second signal does what it always did.

    One process alone looks at a flag (`received`), which costs nothing. Of several, all stop after the same
    step whichever got the signal: JAX's preemption service hands SIGTERM on and finds a step that none of
    them has passed. SIGINT is passed on to it. Threads other than the main one cannot listen.

    Attributes:
        received: the signal, None before.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():
            return self
        if jax.process_count() == 1:
            self._listen(signal.SIGTERM, self._remember)
            self._listen(signal.SIGINT, self._remember)
        elif _service() is not None:
            self._listen(signal.SIGINT, self._pass_on)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def reached(self, step: int) -> bool:
        """Whether the run is to stop after this step; all processes ask after every one."""
        if jax.process_count() > 1 and _service() is not None and multihost_utils.reached_preemption_sync_point(step):
            self.received = signal.SIGTERM
        return self.received is not None

    def check(self) -> None:
        """Ends a process that is alone and is to stop; between steps others would be left waiting.

        Raises:
            Stopped: where the signal came.
        """
        if self.received is not None:
            raise Stopped

    def leave(self) -> NoReturn:
        """Raises what ends the process with the signal's status: `KeyboardInterrupt`, or `SystemExit` of 143."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)

    def _listen(self, number: signal.Signals, handler: Handler) -> None:
        self._before[number] = signal.signal(number, handler)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()

    def _pass_on(self, *_: object) -> None:
        self._restore()
        signal.raise_signal(signal.SIGTERM)


def _service() -> object | None:
    return distributed_state().preemption_sync_manager
