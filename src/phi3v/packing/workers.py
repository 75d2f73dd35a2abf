"""Worker processes that make packs: in order, the same bits whatever their number, and however many of them die.

These are not PyTorch's: when a worker of its DataLoader dies, a signal handler raises a RuntimeError wherever the
training happens to be, for instance in the middle of a checkpoint.
"""

from __future__ import annotations

import gc
import io
import mmap
import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, Protocol

import torch
from torch import Tensor

from phi3v.base.errors import InputError
from phi3v.packing.pack import Pack

Log = Callable[[str], None]

MAX_DEATHS = 3
"""Workers that may die of one pack. One death is bad luck; so many are caused by the pack."""

DYING_S = 5.0
"""Seconds to wait for a killed process. One that hangs in the kernel takes longer and is not waited for."""

THROUGH_PIPE = 2**20
"""Bytes of the largest array that travels through the pipe; larger ones, images, go through shared memory."""


class Order(Protocol):
    """A pack to make. Its text says where its examples are from."""

    @property
    def number(self) -> int: ...

    def make(self) -> Pack: ...


def packs_by_workers(
    orders: Iterator[Order], *, num_workers: int, packs_ahead: int, timeout_s: float, log: Log
) -> Iterator[Pack]:
    """The packs of the orders, in their order, whichever worker makes them and whenever it is done.

    Raises InputError, in the turn of its pack, for a pack that no worker survives, and for one that no worker delivers
    within `timeout_s` (0 waits forever).
    """
    ahead = num_workers * packs_ahead
    due = asked = 0  # numbers of the next pack to yield and of the next order to give
    made: dict[int, Pack | Exception] = {}
    workers = [_Worker() for _ in range(num_workers)]
    try:
        while True:
            for worker in workers:
                if not worker.order and asked - due <= ahead and (order := next(orders, None)):
                    worker.ask(order)
                    asked += 1
            if due == asked:
                return
            busy = [worker for worker in workers if worker.order]
            ready = wait([worker.connection for worker in busy], 0 if due in made else timeout_s or None)
            for worker in busy:
                if worker.connection in ready:
                    made |= worker.answer(log)
            if ready:
                continue  # give an idle worker its next order before the training gets its pack
            if due not in made:
                late = next(worker.order for worker in busy if worker.order and worker.order.number == due)
                raise InputError(f"{late}: no data worker has delivered this pack within {timeout_s:g} s")
            pack = made.pop(due)
            due += 1
            if isinstance(pack, Exception):
                raise pack
            yield pack
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process that makes one pack at a time. If it dies, another takes its place and begins the pack again."""

    def __init__(self) -> None:
        self.order: Order | None = None
        self._deaths = 0
        self._start()

    def _start(self) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.Process(target=_work, args=(self.connection, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, order: Order) -> None:
        """Sends an order to an idle worker, which is listening, so that this does not block."""
        self.order, self._deaths = order, 0
        self._send()

    def _send(self) -> None:
        with suppress(ConnectionError):  # the worker has died: `answer` notices
            self.connection.send(self.order)

    def answer(self, log: Log) -> dict[int, Pack | Exception]:
        """{number: pack or exception} for the order; {} if the worker died and a new one tries again."""
        assert self.order
        answer: Pack | Exception
        try:
            answer = _receive(self.connection)
        except (EOFError, OSError):  # multiprocessing raises a plain OSError in the middle of a message
            self._process.join(DYING_S)
            death = _death(self._process.exitcode)
            self._deaths += 1
            self.end()
            self._start()
            if self._deaths < MAX_DEATHS:
                log(f"a data worker died ({death}); another begins its pack again: {self.order}")
                self._send()
                return {}
            answer = InputError(f"{self.order}: a data worker died {MAX_DEATHS} times at this pack ({death})")
        number, self.order = self.order.number, None
        return {number: answer}

    def end(self) -> None:
        """Kills the process. There is nothing to clean up: its pipe and its shared memory have no names."""
        self.connection.close()
        if self._process.exitcode is None:  # when Python itself exits, the process is gone already
            self._process.kill()
            self._process.join(DYING_S)


def _death(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"exit code {exitcode}"
    return f"exit signal {-exitcode}{'; out of memory?' if exitcode == -signal.SIGKILL else ''}"


def _work(ours: Connection, theirs: Connection) -> None:
    """Makes packs until the other end of the pipe closes, at the latest with the training process."""
    ours.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process, which finishes its step
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # a collection touches every object, and would copy all pages shared with the parent
    torch.set_num_threads(1)  # OpenMP threads do not survive a fork: a worker would wait for them forever
    with suppress(EOFError, OSError):
        while True:
            _send(theirs, _answer(theirs.recv()))


def _answer(order: Order) -> Pack | Exception:
    try:
        return order.make()
    except Exception as error:
        if not isinstance(error, InputError):
            error.add_note(traceback.format_exc())
        return error


def _send(connection: Connection, answer: Pack | Exception) -> None:
    """Sends a pack as one message, and every large array as a file in memory."""
    large: list[pickle.PickleBuffer] = []

    def small(buffer: pickle.PickleBuffer) -> bool:
        if buffer.raw().nbytes > THROUGH_PIPE:
            large.append(buffer)
            return False
        return True

    message = io.BytesIO()
    _Pickler(message, protocol=5, buffer_callback=small).dump(answer)
    connection.send((message.getvalue(), len(large)))
    for buffer in large:
        with open(os.memfd_create("pack"), "wb") as file:
            file.write(buffer)
            file.flush()
            send_handle(connection, file.fileno(), None)


def _receive(connection: Connection) -> Any:
    message, num_large = connection.recv()
    large = []
    for _ in range(num_large):
        with open(recv_handle(connection), "r+b") as file:
            large.append(mmap.mmap(file.fileno(), 0))
    return pickle.loads(message, buffers=large)


class _Pickler(pickle.Pickler):
    """Pickles tensors as NumPy arrays, whose memory can travel beside the message.

    PyTorch's own way costs an open file and a handshake per tensor, and needs a large /dev/shm, which containers lack.
    """

    def reducer_override(self, value: object) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, Tensor) else NotImplemented
