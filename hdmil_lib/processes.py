"""Helper processes, which end with the work that they were started for."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any

from tqdm.std import tqdm


@contextmanager
def helper_processes(
    count: int, initializer: Callable[..., object] | None = None, initargs: tuple[Any, ...] = ()
) -> Iterator[ProcessPoolExecutor]:
    """Start processes with fresh imports, and end them when the `with` block ends.

    Ctrl-C in a terminal reaches every process of a command. The helpers never get it, not even while they
    import modules: this process ends them. If the block ends with an error or with Ctrl-C, jobs that run are
    not waited for. Helpers also end when this process is killed.

    Args:
        count: Number of processes.
        initializer: Function that each process calls first.
        initargs: Arguments of `initializer`.
    """
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, context, _start, (initializer, initargs))
    try:
        with _without_interrupts():
            for _ in range(count):
                pool.submit(int)  # the pool starts a process with each of its first jobs
        yield pool
    except BaseException:
        for helper in set(multiprocessing.active_children()) - others:
            helper.terminate()
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


def _start(initializer: Callable[..., object] | None, initargs: tuple[Any, ...]) -> None:
    end_with_parent()
    tqdm.set_lock(threading.RLock())  # tqdm's own is a semaphore that would outlive a process that is ended
    if initializer is not None:
        initializer(*initargs)


def end_with_parent() -> None:
    """Let this helper process end when its parent is gone, also if that was killed."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back until the `with` block ends; processes that are started in it never get it."""
    came = threading.Event()
    is_main = threading.current_thread() is threading.main_thread()  # no other thread is interrupted
    handler = signal.signal(signal.SIGINT, lambda *_: came.set()) if is_main else None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # of this thread, and of its children
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if is_main:
            signal.signal(signal.SIGINT, handler)
    if came.is_set():
        signal.raise_signal(signal.SIGINT)
