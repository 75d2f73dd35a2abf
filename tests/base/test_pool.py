"""A function over items in worker processes: the same results in the same order, whatever happens to the workers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from phi3v.base.errors import InputError
from phi3v.base.pool import forked_map, num_cores


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("chunk", [1, 7])
def test_results_are_in_order(num_workers: int, chunk: int) -> None:
    offset = 5  # a closure, which cannot be pickled
    found = list(forked_map(lambda n: (n + offset, os.getpid()), range(50), num_workers, chunk=chunk))
    assert [number for number, _ in found] == list(range(5, 55))
    assert (os.getpid() in {process for _, process in found}) == (num_workers == 0)
    assert list(forked_map(str, [], num_workers)) == []


def test_items_are_taken_as_results_are() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    results = forked_map(str, items(), 2)
    assert [next(results) for _ in range(10)] == list(map(str, range(10)))
    assert len(taken) < 50
    results.close()  # type: ignore[attr-defined]


def test_errors() -> None:
    def fail(number: int) -> int:
        if number == 3:
            raise InputError("number 3 is odd")
        return number

    with pytest.raises(InputError, match="number 3 is odd"):
        list(forked_map(fail, range(100), 2))
    with pytest.raises(InputError, match="a worker process was killed"):
        list(forked_map(lambda number: os._exit(9), range(100), 2))


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    def work(number: int) -> None:
        (tmp_path / f"{os.getpid()}").touch()
        time.sleep(60)

    parent = multiprocessing.get_context("fork").Process(target=lambda: list(forked_map(work, range(8), 2)))
    parent.start()
    deadline = time.monotonic() + 60
    while len(workers := list(tmp_path.iterdir())) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert parent.pid is not None
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    while any(_runs(int(worker.name)) for worker in workers):
        assert time.monotonic() < deadline, "workers outlive the process that was killed"
        time.sleep(0.01)


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_ranks_of_a_host_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert num_cores() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert num_cores() == 1
