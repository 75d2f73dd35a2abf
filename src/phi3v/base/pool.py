"""Spread a function over the cores: forked worker processes that end with their parent.

They are forked because importing torch and transformers again would take longer than most jobs do. So the function may
be a closure over anything; only items and results are pickled.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from phi3v.base.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNKS_AHEAD = 4
"""Chunks submitted per worker. Together with their results they are all that is in memory."""


def num_cores() -> int:
    """Number of cores this process may use; the ranks of a host share them."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def forked_map(
    function: Callable[[Item], Result], items: Iterable[Item], num_workers: int, *, chunk: int = 1
) -> Iterator[Result]:
    """Yield `function(item)` for every item, in order, computed by `num_workers` processes, `chunk` items at a time.

    With 0 workers the calling process computes them. Items are consumed as results are. Raises what the function
    raises, and InputError if a worker is killed.
    """
    if num_workers == 0:
        return map(function, items)
    pool = ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_start,
        initargs=(function, os.getpid()),
    )
    left = iter(items)
    chunks = iter(lambda: list(islice(left, chunk)), list[Item]())
    # The first submission forks. It happens here, not at the first `next`, which may be inside a progress bar: that has
    # a thread, and threads and forks do not mix.
    pending = deque(pool.submit(_run, some) for some in islice(chunks, CHUNKS_AHEAD * num_workers))
    return _results(pool, pending, chunks)


def _results(
    pool: ProcessPoolExecutor, pending: deque[Future[list[Any]]], chunks: Iterator[list[Any]]
) -> Iterator[Any]:
    try:
        while pending:
            yield from pending.popleft().result()
            pending.extend(pool.submit(_run, some) for some in islice(chunks, 1))
    except BrokenProcessPool as error:
        raise InputError("a worker process was killed, probably because the memory is full") from error
    finally:
        pool.shutdown(cancel_futures=True)


# -- in a worker -------------------------------------------------------------------------------------------------------

_function: Callable[[Any], Any]


def _start(function: Callable[[Any], Any], parent: int) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end when the parent is killed
    if os.getppid() != parent:
        os._exit(1)


def _run(items: list[Any]) -> list[Any]:
    return [_function(item) for item in items]
