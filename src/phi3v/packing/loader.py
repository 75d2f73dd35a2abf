"""From a plan to packs, in order, read ahead by worker processes.

Its invariant: the packs are the same, bit for bit, whatever `num_workers` is and however many workers die, and reading
them touches no global random state. A worker gets the few examples of its pack with the order to make it, so the data
set is never copied to it.

The workers are our own, because PyTorch's DataLoader does not outlive one of its: it raises a RuntimeError from a
signal handler, wherever the training happens to be, and be it in the middle of writing a checkpoint.
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
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from phi3v.base.errors import InputError
from phi3v.data.encode import Encoded
from phi3v.packing.pack import Lost, OnBadExample, Pack, make_pack
from phi3v.packing.schedule import EpochPlan, PackPlan, Step, plan_prompts
from phi3v.packing.trees import Lengths, PackLimits

About = TypeVar("About")
Tell = Callable[[str], None]

MAX_DEATHS = 3
"""Workers that may die of one pack. One is bad luck, so many are the pack's own doing."""

DYING_S = 5.0
"""How long a process may take to die; one that hangs in the kernel takes longer, and is not waited for."""

THROUGH_PIPE = 2**20
"""Bytes of the largest array that a worker sends through its pipe; those above, pictures, go through shared memory."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How packs are made."""

    image_token_id: int
    num_crops: int

    num_workers: int = 0
    """Processes that decode images; 0 does it in the training process, best for small images and few cores."""

    packs_ahead: int = 2
    """Packs made ahead of the training, for every worker."""

    pin_memory: bool = False
    """Page-locked memory, for copies to a CUDA device that do not wait."""

    retries: int = 6
    """Times that the images of a pack are tried again while their file system is slow or gone."""

    retry_pause_s: float = 1.0
    """Pause before the first retry; every further one is twice as long: 1 + 2 + 4 + 8 + 16 + 32 = 63 s in all."""

    timeout_s: float = 300.0
    """How long to wait for workers of which none delivers anything, as when a read hangs for ever; 0 waits for ever.
    Must be longer than all retries; shorter than the 10 minutes after which NCCL gives up on a rank that waits."""

    on_bad_example: OnBadExample = "stop"
    """What to do about a training example whose image cannot be read. `skip` makes the pack without it and says so."""

    @property
    def pauses_s(self) -> tuple[float, ...]:
        return tuple(self.retry_pause_s * 2**retry for retry in range(self.retries))


class MicroBatch(NamedTuple):
    """One pack of this rank. After the last pack of a step the optimizer steps."""

    step: Step
    last: bool
    pack: Pack

    @property
    def lost(self) -> tuple[Lost, ...]:
        """The examples that were skipped. With w their weights over all packs and ranks of the step, the loss and the
        gradients of the step, divided by 1 - w, are those of the step without them."""
        return self.pack.lost


class PromptBatch(NamedTuple):
    """A pack of prompts; branch b of the pack is prompt `numbers[b]`."""

    numbers: tuple[int, ...]
    pack: Pack


def training_packs(
    encoded: Sequence[Encoded],
    plan: EpochPlan,
    reading: Reading,
    *,
    first_step: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
    tell: Tell = warnings.warn,
) -> Iterator[MicroBatch]:
    """The packs of one rank from a step of an epoch to its end. `tell` is told of workers that died.

    Raises InputError, in the turn of its pack, for an image that cannot be read (unless it is to be skipped) and for a
    pack that no worker survives or returns from.
    """

    def orders() -> Iterator[tuple[tuple[Step, bool], PackPlan]]:
        for number in range(first_step, len(plan)):
            step, ranks = plan.packs(number, num_ranks)
            for index, trees in enumerate(ranks[rank]):
                yield (step, index == step.packs - 1), trees

    for (step, last), pack in _read(encoded, orders(), reading, tell):
        yield MicroBatch(step, last, pack)


def prompt_packs(
    encoded: Sequence[Encoded],
    limits: PackLimits,
    reading: Reading,
    *,
    max_new_tokens: int,
    rank: int = 0,
    num_ranks: int = 1,
    tell: Tell = warnings.warn,
) -> Iterator[PromptBatch]:
    """The packs of one rank for generation, over all ranks every prompt once; every rank gets the same number of packs.

    Raises InputError as `training_packs` does, and for every image that cannot be read: no prompt is skipped.
    """

    def orders() -> Iterator[tuple[tuple[int, ...], PackPlan]]:
        lengths = Lengths.of(encoded)
        for ranks in plan_prompts(lengths, limits, max_new_tokens=max_new_tokens, num_ranks=num_ranks):
            for trees in ranks[rank]:
                yield tuple(number for tree in trees for number in tree.examples), trees

    for numbers, pack in _read(encoded, orders(), replace(reading, on_bad_example="stop"), tell):
        yield PromptBatch(numbers, pack)


class _Order(NamedTuple):
    """What a pack is made from: its trees, and their examples by number."""

    number: int
    trees: PackPlan
    encoded: dict[int, Encoded]

    def make(self, reading: Reading) -> Pack:
        return make_pack(
            self.trees,
            self.encoded,
            image_token_id=reading.image_token_id,
            num_crops=reading.num_crops,
            pauses_s=reading.pauses_s,
            on_bad_example=reading.on_bad_example,
        )

    def __str__(self) -> str:
        """Where its examples are from: "train.jsonl:41, 57, 3"."""
        if not self.encoded:
            return "empty pack"
        first, *others = (example.where for example in self.encoded.values())
        file = first.rpartition(":")[0] + ":"
        more = f" and {len(others) - 49} more" if len(others) > 49 else ""
        return ", ".join([first, *(where.removeprefix(file) for where in others[:49])]) + more


def _read(
    encoded: Sequence[Encoded], orders: Iterable[tuple[About, PackPlan]], reading: Reading, tell: Tell
) -> Iterator[tuple[About, Pack]]:
    """The packs, in order, each with what `orders` says about it."""
    ordered: deque[About] = deque()

    def sent() -> Iterator[_Order]:
        for number, (about, trees) in enumerate(orders):
            ordered.append(about)
            yield _Order(number, trees, {index: encoded[index] for tree in trees for index in tree.examples})

    alone = (order.make(reading) for order in sent())
    for pack in _by_workers(sent(), reading, tell) if reading.num_workers else alone:
        yield ordered.popleft(), pack.pin_memory() if reading.pin_memory else pack


def _by_workers(orders: Iterator[_Order], reading: Reading, tell: Tell) -> Iterator[Pack]:
    """The packs of the orders, in their order, whichever worker makes them and whenever it is done."""
    ahead = reading.num_workers * reading.packs_ahead
    due = asked = 0  # numbers of the next pack to yield and of the next order to give
    made: dict[int, Pack | Exception] = {}
    workers = [_Worker(reading) for _ in range(reading.num_workers)]
    try:
        while True:
            for worker in workers:
                if not worker.order and asked - due <= ahead and (order := next(orders, None)):
                    worker.ask(order)
                    asked += 1
            if due == asked:
                return
            busy = [worker for worker in workers if worker.order]
            ready = wait([worker.connection for worker in busy], 0 if due in made else reading.timeout_s or None)
            for worker in busy:
                if worker.connection in ready:
                    made |= worker.answer(tell)
            if ready:
                continue  # an idle worker comes before the training
            if due not in made:
                order = next(worker.order for worker in busy if worker.order and worker.order.number == due)
                raise InputError(f"{order}: no data worker has delivered this pack within {reading.timeout_s:g} s")
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

    def __init__(self, reading: Reading) -> None:
        self.order: _Order | None = None
        self._reading = reading
        self._deaths = 0
        self._start()

    def _start(self) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        arguments = (self.connection, theirs, self._reading)
        self._process = multiprocessing.Process(target=_work, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, order: _Order) -> None:
        """Gives an order to a worker that has none: it listens, so that this waits for nothing."""
        self.order, self._deaths = order, 0
        self._send()

    def _send(self) -> None:
        with suppress(ConnectionError):  # it has died meanwhile: `answer` will see
            self.connection.send(self.order)

    def answer(self, tell: Tell) -> dict[int, Pack | Exception]:
        """The pack it was asked for, by its number, or why there is none; nothing if it died and tries again."""
        assert self.order
        try:
            answer = _receive(self.connection)
        except (EOFError, OSError):  # no ConnectionError, but an OSError of its own, in the middle of a message
            self._process.join(DYING_S)
            death = _death(self._process.exitcode)
            self._deaths += 1
            self.end()
            self._start()
            if self._deaths < MAX_DEATHS:
                tell(f"a data worker died ({death}); another begins its pack again: {self.order}")
                self._send()
                return {}
            answer = InputError(f"{self.order}: a data worker died {MAX_DEATHS} times at this pack ({death})")
        number, self.order = self.order.number, None
        return {number: answer}

    def end(self) -> None:
        """Ends the process. It has nothing to clean up: its pipe and its shared memory have no names."""
        self.connection.close()
        if self._process.exitcode is None:  # it has one when Python itself ends, with half of its modules gone
            self._process.kill()
            self._process.join(DYING_S)


def _death(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"exit code {exitcode}"
    return f"exit signal {-exitcode}{'; out of memory?' if exitcode == -signal.SIGKILL else ''}"


def _work(ours: Connection, theirs: Connection, reading: Reading) -> None:
    """What a worker does until the other end of its pipe closes, with the training process at the latest."""
    ours.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process, which finishes its step
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # and not what the training process does at it
    gc.freeze()  # a collection touches every object, and would copy all that a forked worker shares
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork: waiting for them, a worker would hang
    with suppress(EOFError, OSError):
        while True:
            _send(theirs, _answer(theirs.recv(), reading))


def _answer(order: _Order, reading: Reading) -> Pack | Exception:
    """The pack, or what was raised instead."""
    try:
        return order.make(reading)
    except Exception as error:
        if not isinstance(error, InputError):
            error.add_note(traceback.format_exc())
        return error


def _send(connection: Connection, answer: Pack | Exception) -> None:
    """Sends a pack as one message, and a file in memory for every large array."""
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


def _receive(connection: Connection) -> Pack | Exception:
    message, num_large = connection.recv()
    large = []
    for _ in range(num_large):
        with open(recv_handle(connection), "r+b") as file:
            large.append(mmap.mmap(file.fileno(), 0))
    return pickle.loads(message, buffers=large)


class _Pickler(pickle.Pickler):
    """Tensors as NumPy arrays, whose memory can travel beside the message. PyTorch's own way costs every tensor an open
    file and a handshake, and needs a large /dev/shm, which containers do not have."""

    def reducer_override(self, value: object) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, Tensor) else NotImplemented
