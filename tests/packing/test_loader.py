"""Packs come in the plan's order, the same with and without workers, and errors say what to mend."""

import dataclasses
import errno
import gc
import multiprocessing
import os
import pickle
import re
import signal
import time
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from phi3v.base.errors import InputError
from phi3v.packing import workers
from phi3v.packing.loader import Reading, prompt_packs, training_packs
from phi3v.packing.pack import make_pack
from phi3v.packing.schedule import ScheduleSettings, schedule_epoch
from phi3v.packing.trees import Lengths, PackLimits

IMAGE = 32044
READING = Reading(image_token_id=IMAGE, num_crops=4)
LIMITS = PackLimits(max_tokens_per_pack=1000, max_crops_per_pack=100)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(5):
        noise = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(5)]


@pytest.fixture
def encoded(fabricate, images):
    """Three questions on each of five pages, and a text."""
    pages = [
        fabricate(3, image, 5, -2, id=f"{page}.{n}", seed=n) for page, image in enumerate(images) for n in range(3)
    ]
    return [*pages, fabricate(9, -3, id="text")]


def plan_of(encoded, **setting):
    settings = ScheduleSettings(**{"batch_size": 6, "limits": LIMITS, **setting})
    return schedule_epoch(Lengths.of(encoded), settings, seed=1, epoch=0)


def with_workers(number, **setting):
    return dataclasses.replace(READING, num_workers=number, **setting)


def assert_equal(one, two):
    """Bitwise, field by field."""
    assert (one.step, one.last, one.pack.ids) == (two.step, two.last, two.pack.ids)
    assert one.pack.layout.trees == two.pack.layout.trees
    for a, b in ((one.pack, two.pack), (one.pack.layout, two.pack.layout)):
        for field in dataclasses.fields(a):
            value = getattr(a, field.name)
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, getattr(b, field.name))


def test_packs_are_those_of_the_plan(encoded):
    plan = plan_of(encoded)
    batches = iter(training_packs(encoded, plan, READING))
    for number in range(len(plan)):
        step, (packs,) = plan.packs(number)
        for index, trees in enumerate(packs):
            batch = next(batches)
            assert (batch.step, batch.last) == (step, index == len(packs) - 1)
            pack = make_pack(trees, encoded, image_token_id=IMAGE, num_crops=4)
            assert_equal(batch, batch._replace(pack=pack))
    assert next(batches, None) is None
    assert [plan.packs(number)[0].packs for number in range(len(plan))] == [2, 2, 2]


def test_workers_change_nothing(encoded):
    plan = plan_of(encoded)
    alone = list(training_packs(encoded, plan, READING))
    helped = list(training_packs(encoded, plan, with_workers(2, packs_ahead=1)))
    assert len(alone) == len(helped)
    for one, two in zip(alone, helped, strict=True):
        assert_equal(one, two)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_reading_leaves_the_global_random_state_alone(encoded, num_workers):
    """Or dropout would differ between a run and its resumed twin."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(training_packs(encoded, plan_of(encoded), with_workers(num_workers)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_resumed_epoch_is_the_rest_of_it(encoded):
    whole = [batch for batch in training_packs(encoded, plan_of(encoded), READING) if batch.step.number >= 1]
    resumed = list(training_packs(encoded, plan_of(encoded), READING, first_step=1))
    assert len(whole) == len(resumed)
    for one, two in zip(whole, resumed, strict=True):
        assert_equal(one, two)


def test_ranks_share_a_step(encoded):
    plan = plan_of(encoded, batch_size=3)
    alone = list(training_packs(encoded, plan, READING))
    ranks = [list(training_packs(encoded, plan, READING, rank=rank, num_ranks=3)) for rank in range(3)]
    assert len({len(batches) for batches in ranks}) == 1
    for side_by_side in zip(*ranks, strict=True):
        assert len({batch.step for batch in side_by_side}) == len({batch.last for batch in side_by_side}) == 1
    ids = [sorted(name for batch in batches for name in batch.pack.ids) for batches in (alone, chain(*ranks))]
    assert ids[0] == ids[1] == sorted(example.id for example in encoded)
    weights = sum(
        float(batch.pack.loss_weights.sum()) for batches in ranks for batch in batches if batch.step.number == 0
    )
    assert weights == pytest.approx(1, abs=1e-6)
    assert any(batch.pack.tokens == 0 for batches in ranks for batch in batches)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_image_stops_in_its_turn_with_one_line(encoded, images, tmp_path, num_workers):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    plan = plan_of(encoded)
    page = next(page for page in range(5) if page not in plan.lengths.page[plan.examples(0)])
    for index in np.flatnonzero(plan.lengths.page == page):
        encoded[index] = dataclasses.replace(encoded[index], images=(str(broken),))
    batches = training_packs(encoded, plan, with_workers(num_workers))
    for batch in batches:
        if batch.last:
            break
    with pytest.raises(InputError) as caught:
        list(batches)
    assert re.fullmatch(rf"train\.jsonl:({page}\.[012]): example \1: {broken}: unreadable image .*", str(caught.value))


def test_a_worker_is_sent_only_the_examples_of_its_pack(encoded, monkeypatch):
    """The data set itself never goes to a worker: a million examples cost it nothing."""
    sent = []
    monkeypatch.setattr("phi3v.packing.loader.make_pack", lambda trees, encoded, **_: sent.append((trees, encoded)))
    list(training_packs(encoded, plan_of(encoded), READING))
    assert len(sent) == 6
    for trees, examples in sent:
        assert sorted(examples) == sorted(example for tree in trees for example in tree.examples)
        assert len(pickle.dumps((trees, examples))) < 5000


def test_prompts_come_once_with_their_numbers(fabricate, images):
    prompts = [fabricate(3, image, 5, id=f"{n}.{page}", seed=n) for n in range(3) for page, image in enumerate(images)]
    seen = []
    for numbers, pack in prompt_packs(prompts, LIMITS, READING, max_new_tokens=8):
        assert pack.ids == tuple(prompts[number].id for number in numbers)
        assert pack.branch.tolist() == list(range(len(numbers)))
        assert pack.tokens + 8 * len(numbers) <= LIMITS.max_tokens_per_pack
        assert len(pack.layout.trees) == len({number % 5 for number in numbers})
        seen += numbers
    assert sorted(seen) == list(range(15))


def test_ranks_share_the_prompts(fabricate):
    prompts = [fabricate(4 + n, id=str(n), seed=n) for n in range(5)]
    ranks = [list(prompt_packs(prompts, LIMITS, READING, max_new_tokens=8, rank=r, num_ranks=7)) for r in range(7)]
    assert {len(batches) for batches in ranks} == {1}
    assert sorted(number for (batch,) in ranks for number in batch.numbers) == list(range(5))


# Reading that goes wrong. A forked worker makes packs with what the test put in the place of `make_pack`.


@pytest.fixture(autouse=True)
def nothing_stays():
    """No test leaves a process behind, or an open file."""
    multiprocessing.resource_tracker.ensure_running()  # its own helper, which stays
    files = len(os.listdir("/proc/self/fd"))
    yield
    assert multiprocessing.active_children() == []
    if len(os.listdir("/proc/self/fd")) > files:
        gc.collect()  # what `pytest.raises` caught holds the frames it came from
    assert len(os.listdir("/proc/self/fd")) <= files  # fewer when the garbage of other tests goes meanwhile


@pytest.fixture
def making(monkeypatch):
    """Lets a function of a pack's ids happen in the worker that makes it, before or after it has been made."""

    def put(before=lambda ids: None, after=lambda ids: None):
        def make(trees, encoded, **setting):
            ids = [encoded[example].id for tree in trees for example in tree.examples]
            before(ids)
            pack = make_pack(trees, encoded, **setting)
            after(ids)
            return pack

        monkeypatch.setattr("phi3v.packing.loader.make_pack", make)

    return put


def die(number=signal.SIGKILL):
    os.kill(os.getpid(), number)


def once(path, action):
    """Does something the first time only, over all processes."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return
    action()


def assert_same(batches, wanted):
    batches = list(batches)
    assert len(batches) == len(wanted)
    for one, two in zip(batches, wanted, strict=True):
        assert_equal(one, two)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_worker_that_dies_changes_no_pack(encoded, making, tmp_path, num_workers, moment):
    plan = plan_of(encoded)
    wanted = list(training_packs(encoded, plan, READING))
    victim = wanted[2].pack.ids[0]
    making(**{moment: lambda ids: victim in ids and once(tmp_path / "died", die)})
    told = []
    assert_same(training_packs(encoded, plan, with_workers(num_workers), log=told.append), wanted)
    (line,) = told
    assert re.fullmatch(
        r"a data worker died \(exit signal 9; out of memory\?\); another begins its pack again: train\.jsonl:.*", line
    )
    assert all(name in line for name in wanted[2].pack.ids)


def test_deaths_are_counted_by_pack(encoded, making, tmp_path):
    plan = plan_of(encoded)
    wanted = list(training_packs(encoded, plan, READING))
    making(before=lambda ids: once(tmp_path / ids[0], die))
    told = []
    assert_same(training_packs(encoded, plan, with_workers(1), log=told.append), wanted)
    assert len(told) == 6


def test_a_pack_outlives_the_worker_that_made_it(encoded, monkeypatch, tmp_path):
    """It lies in the pipe, not fetched yet, when its worker dies."""
    plan = plan_of(encoded)
    wanted = list(training_packs(encoded, plan, READING))

    send = workers._send

    def send_and_die(connection, pack):
        send(connection, pack)
        if pack.ids == wanted[1].pack.ids:
            once(tmp_path / "died", die)

    monkeypatch.setattr(workers, "_send", send_and_die)
    told = []
    batches = training_packs(encoded, plan, with_workers(1), log=told.append)
    first = next(batches)
    (worker,) = multiprocessing.active_children()
    worker.join()
    assert_same(chain([first], batches), wanted)
    (line,) = told
    assert wanted[2].pack.ids[0] in line


def test_an_idle_worker_that_dies_is_replaced(encoded):
    plan = plan_of(encoded)
    wanted = list(training_packs(encoded, plan, READING))
    told = []
    batches = training_packs(encoded, plan, with_workers(2, packs_ahead=1), log=told.append)
    seen = [next(batches)]
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()
    assert_same(chain(seen, batches), wanted)
    assert len(told) == 2


def test_a_worker_may_die_at_an_empty_pack(encoded, making, tmp_path):
    plan = plan_of(encoded, batch_size=3)
    wanted = list(training_packs(encoded, plan, READING, rank=2, num_ranks=3))
    assert not wanted[0].pack.ids
    making(before=lambda ids: ids or once(tmp_path / "died", die))
    told = []
    assert_same(training_packs(encoded, plan, with_workers(1), rank=2, num_ranks=3, log=told.append), wanted)
    assert "again: empty pack" in told[0]


def test_a_pack_that_no_worker_survives_stops_in_its_turn(encoded, making):
    plan = plan_of(encoded)
    wanted = list(training_packs(encoded, plan, READING))
    victim = wanted[3].pack.ids
    making(before=lambda ids: victim[0] in ids and die(signal.SIGTERM))
    told = []
    batches = training_packs(encoded, plan, with_workers(2), log=told.append)
    assert_same(islice(batches, 3), wanted[:3])
    with pytest.raises(InputError, match=r"a data worker died 3 times at this pack \(exit signal 15\)$") as caught:
        next(batches)
    assert str(caught.value).startswith(f"train.jsonl:{', '.join(victim)}: ")
    assert len(told) == 2


def test_a_read_that_hangs_is_named(encoded, making):
    plan = plan_of(encoded)
    wanted = list(training_packs(encoded, plan, READING))
    victim = wanted[2].pack.ids
    making(before=lambda ids: victim[0] in ids and time.sleep(1000))
    batches = training_packs(encoded, plan, with_workers(2, timeout_s=2))
    assert_same(islice(batches, 2), wanted[:2])
    with pytest.raises(InputError) as caught:
        next(batches)
    assert str(caught.value) == f"train.jsonl:{', '.join(victim)}: no data worker has delivered this pack within 2 s"


def test_a_bug_in_a_worker_keeps_its_traceback(encoded, making):
    making(before=lambda ids: [][1])
    with pytest.raises(IndexError) as caught:
        list(training_packs(encoded, plan_of(encoded), with_workers(2)))
    assert "test_loader.py" in caught.value.__notes__[0]


def test_a_message_names_at_most_fifty_examples(fabricate, making):
    making(before=lambda ids: die())
    examples = [fabricate(2, -2, id=str(number), seed=number) for number in range(60)]
    with pytest.raises(InputError, match=r"^train\.jsonl:\d+(, \d+){49} and 10 more: a data worker died"):
        list(training_packs(examples, plan_of(examples, batch_size=60), with_workers(1), log=str))


def test_ctrl_c_does_not_reach_the_workers(encoded):
    """It is sent to all processes of a terminal, and the training finishes its step."""
    plan = plan_of(encoded)
    wanted = list(training_packs(encoded, plan, READING))
    told = []
    batches = training_packs(encoded, plan, with_workers(1), log=told.append)
    seen = [next(batches)]
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGINT)
    assert_same(chain(seen, batches), wanted)
    assert told == []


def test_packs_are_made_ahead_but_not_without_end(encoded, making, tmp_path):
    """While the first pack takes its time, the other worker makes the six that follow it, and no more."""
    plan = plan_of(encoded, batch_size=1)
    slow = encoded[plan.examples(0)[0]].id

    def wait(ids):
        while slow in ids and len(os.listdir(tmp_path)) < 6:
            time.sleep(0.01)
        time.sleep(0.3 if slow in ids else 0)

    making(before=wait, after=lambda ids: (tmp_path / ids[0]).touch())
    next(training_packs(encoded, plan, with_workers(2, packs_ahead=3, timeout_s=30)))
    assert len(os.listdir(tmp_path)) == 7


def test_orders_and_packs_may_be_larger_than_a_pipe_holds(fabricate):
    """Or a worker that delivers and the training that asks would wait for each other."""
    examples = [fabricate(200, -50, id=f"{number:0500}", seed=number) for number in range(3000)]
    limits = PackLimits(max_tokens_per_pack=250_000, max_crops_per_pack=100)
    plan = plan_of(examples, batch_size=1000, limits=limits)
    batches = list(training_packs(examples, plan, with_workers(1, timeout_s=30)))
    assert [len(batch.pack.ids) for batch in batches] == [1000, 1000, 1000]


def test_threads_before_a_fork_do_not_hang_a_worker(encoded):
    """OpenMP's threads are gone in a forked worker, and what it does in parallel would wait for them for ever."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(2**22).add_(1)
        assert len(list(training_packs(encoded, plan_of(encoded), with_workers(2, timeout_s=30)))) == 6
    finally:
        torch.set_num_threads(threads)


def test_workers_need_no_fork(encoded):
    """Python 3.14 starts processes from a server, which gets what it needs by pickling."""
    usual = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        batches = list(training_packs(encoded, plan_of(encoded), with_workers(1)))
    finally:
        multiprocessing.forkserver._forkserver._stop()
        multiprocessing.set_start_method(usual, force=True)
    assert_same(batches, list(training_packs(encoded, plan_of(encoded), READING)))


def test_workers_go_with_the_training_process(encoded):
    """Killed as hard as can be, it has no time to end them."""

    def train(told):
        batches = training_packs(encoded, plan_of(encoded, batch_size=1), with_workers(3, packs_ahead=1))
        next(batches)
        told.send([worker.pid for worker in multiprocessing.active_children()])
        time.sleep(1000)

    told, tell = multiprocessing.Pipe(duplex=False)
    training = multiprocessing.Process(target=train, args=(tell,))
    training.start()
    workers = told.recv()
    assert len(workers) == 3
    assert all(alive(worker) for worker in workers)
    training.kill()
    training.join()
    training.close()
    told.close()
    tell.close()
    until = time.monotonic() + 20
    while any(alive(worker) for worker in workers) and time.monotonic() < until:
        time.sleep(0.1)
    living = [worker for worker in workers if alive(worker)]
    for worker in living:
        os.kill(worker, signal.SIGKILL)
    assert living == []


def alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_dropped_half_way_nothing_stays(encoded, making):
    """However busy the workers are. `nothing_stays` looks at the open files."""
    shared = os.listdir("/dev/shm")
    for pause in (0, 1000):
        making(before=lambda ids, pause=pause: "text" in ids and time.sleep(pause))
        for taken in (0, 1, 3):
            batches = training_packs(encoded, plan_of(encoded, batch_size=1), with_workers(3))
            assert len(list(islice(batches, taken))) == taken
            del batches
            assert multiprocessing.active_children() == []
    assert os.listdir("/dev/shm") == shared


@pytest.mark.parametrize("num_workers", [0, 1])
def test_two_thousand_packs_need_no_more_memory_than_five_hundred(fabricate, images, num_workers):
    head = [[images[n // 20 % 5]] if n % 20 == 0 else [] for n in range(2000)]  # pictures take most of the time
    examples = [fabricate(3, *head[n], 5, -2, id=str(n), seed=n) for n in range(2000)]
    batches = training_packs(examples, plan_of(examples, batch_size=1), with_workers(num_workers))
    sizes = []
    for number, _ in enumerate(batches, 1):
        if number % 500 == 0:
            processes = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]
            pages = sum(int(Path(f"/proc/{process}/statm").read_text().split()[1]) for process in processes)
            sizes.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
    assert len(sizes) == 4
    assert sizes[-1] - sizes[0] < 10  # MiB; one page of every tensor would be 70


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipped_examples_come_with_their_pack(encoded, images, tmp_path, num_workers):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    plan = plan_of(encoded)
    whole = list(training_packs(encoded, plan, READING))
    encoded[:3] = [dataclasses.replace(example, images=(str(broken),)) for example in encoded[:3]]
    batches = list(training_packs(encoded, plan, with_workers(num_workers, on_bad_example="skip")))
    assert [(batch.step, batch.last) for batch in batches] == [(batch.step, batch.last) for batch in whole]
    lost = [example for batch in batches for example in batch.lost]
    assert sorted(example.id for example in lost) == ["0.0", "0.1", "0.2"]
    assert all(f"{broken}: unreadable image" in example.reason for example in lost)
    for batch, other in zip(batches, whole, strict=True):
        assert {*batch.pack.ids, *(example.id for example in batch.lost)} == set(other.pack.ids)
        weights = float(batch.pack.loss_weights.sum()) + sum(example.weight for example in batch.lost)
        assert weights == pytest.approx(float(other.pack.loss_weights.sum()))


def test_prompts_are_never_skipped(fabricate, images, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    prompts = [fabricate(3, image, 5, id=str(number)) for number, image in enumerate(images)]
    prompts[3] = dataclasses.replace(prompts[3], images=(str(broken),))
    reading = dataclasses.replace(READING, on_bad_example="skip")
    with pytest.raises(InputError, match=rf"^train\.jsonl:3: example 3: {broken}: unreadable image"):
        list(prompt_packs(prompts, LIMITS, reading, max_new_tokens=8))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_system_that_comes_back_has_cost_nothing(encoded, monkeypatch, tmp_path, num_workers):
    plan = plan_of(encoded)
    wanted = list(training_packs(encoded, plan, READING))
    real = Image.open

    def failing(path, **named):
        def fail():
            raise OSError(errno.ESTALE, "Stale file handle")

        once(tmp_path / Path(path).name, fail)
        return real(path, **named)

    monkeypatch.setattr(Image, "open", failing)
    reading = with_workers(num_workers, retries=5, retry_pause_s=0.001)
    assert_same(training_packs(encoded, plan, reading), wanted)
    assert len(os.listdir(tmp_path)) == 5


def test_it_is_waited_for_about_a_minute():
    assert Reading(image_token_id=IMAGE, num_crops=4).pauses_s == (1, 2, 4, 8, 16, 32)
