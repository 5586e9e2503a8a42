"""Work in threads that cannot be called off, such as a compiler's, and how a process ends while it goes on."""

import atexit
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

_at_work: set[threading.Thread] = set()


def begin(work: Callable[[], None], name: str) -> threading.Thread:
    """Has a thread do the work, which Python's own end waits for, but not `leave`.

    Args:
        work: What to do; it raises nothing.
        name: The thread's.

    Example:
        >>> done = []
        >>> begin(lambda: done.append(1), "adding").join()
        >>> done
        [1]
    """

    def run() -> None:
        try:
            work()
        finally:
            _at_work.discard(thread)

    # Python would wait for one that is no daemon before anything else is asked.
    thread = threading.Thread(target=run, name=name, daemon=True)
    _at_work.add(thread)
    thread.start()
    return thread


def leave(status: int) -> None:
    """Ends the process at once with its exit status where such work goes on; does nothing where there is none.

    A compiler that is at work when Python goes could take the process down with a signal, and to wait for it could
    take minutes. Of several processes none is ended so, since the others would miss it.
    """
    if not _at_work:
        return
    from phi3_jax.system.compat_jax import distributed_state

    if distributed_state().num_processes > 1:
        return
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


@atexit.register
def _wait() -> None:
    for thread in tuple(_at_work):
        thread.join()
