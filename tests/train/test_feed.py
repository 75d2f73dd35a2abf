"""What the loop is fed: the same steps from wherever it begins, over any ranks, also when examples are lost."""

from __future__ import annotations

import shutil
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from phi3v.base import pool
from phi3v.base.config import Run
from phi3v.base.errors import InputError
from phi3v.base.ranks import ALONE, Ranks
from phi3v.data.encode import Example
from phi3v.data.processor import Phi3VProcessor
from phi3v.data.schema import read_jsonl
from phi3v.model.loading import load_config
from phi3v.packing.loader import MicroBatch, training_packs
from phi3v.packing.ondisk import OnDisk
from phi3v.packing.trees import Lengths
from phi3v.train import feed
from phi3v.train.feed import StepPacks, TrainingData, encode_all, read_data, steps

MAKE = Callable[..., Run]


def data_of(run: Run, ranks: Ranks = ALONE, *, check_first: bool = False) -> TrainingData:
    processor = Phi3VProcessor.from_pretrained(run.base.model)
    return read_data(run, processor, load_config(run.base.model), check_first=check_first, ranks=ranks)


def test_packs_are_as_long_as_suits_the_device(settings_for: MAKE) -> None:
    assert data_of(settings_for()).settings.limits.max_tokens_per_pack == 4096
    assert data_of(settings_for(max_tokens_per_pack=500)).settings.limits.max_tokens_per_pack == 500


def fed(data: TrainingData, first_step: int, total_steps: int) -> list[list[tuple[str, ...]]]:
    """The ids of the packs of every step."""
    found = steps(replace(data, total_steps=total_steps), ALONE, first_step=first_step)
    return [[micro.pack.ids for micro in step.packs()] for step in found]


# -- the data --------------------------------------------------------------------------------------------------------


def test_examples_and_questions_are_read_and_counted(settings_for: MAKE, tiny_data: Path) -> None:
    data = data_of(settings_for(eval=tiny_data))
    assert [encoded.id for encoded in data.encoded] == [f"e{number}" for number in range(14)]
    assert (len(data.lengths), data.lengths.num_pages, data.steps_per_epoch, len(data.eval_sets[0].questions)) == (
        14,
        5,
        4,
        15,
    )
    assert data_of(settings_for()).eval_sets == ()


def test_several_files_are_read_in_order_with_their_weights(
    settings_for: MAKE, tiny_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_data.parent, tmp_path / "other")
    other = tmp_path / "other" / tiny_data.name
    data = data_of(settings_for(train=(tiny_data, Path(f"{other}:0.5")), eval=(tiny_data, Path(f"hard={other}"))))
    assert len(data.encoded) == 28
    assert data.settings.mix == ((14, 1.0), (14, 0.5))
    assert data.lengths.num_pages == 10, "the same images in another file are another page"
    assert data.steps_per_epoch == 6  # 21 examples, four a step
    assert [one.name for one in data.eval_sets] == ["train", "hard"]
    assert data_of(settings_for(train=(tiny_data, other))).settings.mix == ()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [({}, 4), ({"epochs": 2.5}, 10), ({"epochs": 0.01}, 1), ({"max_steps": 7, "epochs": 99.0}, 7)],
)
def test_how_many_steps_a_run_has(flags: dict[str, Any], expected: int, settings_for: MAKE) -> None:
    assert data_of(settings_for(**flags)).total_steps == expected


def test_the_first_problem_of_either_file_is_named_with_the_number_of_others(
    settings_for: MAKE, tiny_data: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    lines = tiny_data.read_text().splitlines()
    bad.write_text("\n".join([lines[0], "{", lines[2], "[]", ""]))
    for flags in ({"train": bad}, {"eval": bad}):
        run = settings_for(image_root=tiny_data.parent / "images", **flags)
        with pytest.raises(InputError, match=r"bad\.jsonl:2: .* \(and 1 more: phi3v check .*bad\.jsonl\)$"):
            data_of(run, check_first=True)


def test_what_is_odd_in_the_data_is_printed_and_kept(
    settings_for: MAKE, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_data.parent, tmp_path / "data")
    train, val = tmp_path / "data/train.jsonl", tmp_path / "data/val.jsonl"
    lines = train.read_text().splitlines()
    train.write_text("\n".join(line.replace('{"id"', '{"license": "MIT", "id"') for line in lines))
    val.write_text("\n".join(lines[:3]))
    for _ in range(2):  # checked, and found checked
        data = data_of(settings_for(train=train, eval=val), check_first=True)
        assert data.warnings == [
            f"{train}: 1 of 14 examples without an image",
            f"{train}:1: unknown key 'license' is ignored (and 13 more lines)",
            f"{val}: 3 of 3 examples are also in {train}",
            f"{val}: 1 of 1 image file (such as {train.parent / 'images/red.png'}): {train} shows the same file",
        ]
        said = " ".join(capsys.readouterr().out.split())
        assert all(f"warning {warning}" in said for warning in data.warnings)
        assert data.contents.keys() == data.image_sizes.keys()
    assert data_of(settings_for(train=train, eval=val)).warnings == []


@dataclass(frozen=True, kw_only=True)
class Two(Ranks):
    """One of two ranks; the other's items are given."""

    num: int = 2
    others: Sequence[Any]

    def gather(self, items: Sequence[Any]) -> list[list[Any]]:
        both = [list(items), list(self.others)]
        return both if self.rank == 0 else both[::-1]

    def any(self, flag: bool) -> bool:
        return flag

    def all_do(self, work: Callable[[], Any]) -> Any:
        return work()


@dataclass(frozen=True, kw_only=True)
class Thread(Ranks):
    """A rank that is a thread."""

    desk: list[Any]
    barrier: threading.Barrier

    def gather(self, items: Sequence[Any]) -> list[list[Any]]:
        self.desk[self.rank] = list(items)
        self.barrier.wait()
        found = list(self.desk)
        self.barrier.wait()
        return found


def together(num: int, work: Callable[[Thread], Any]) -> list[Any]:
    """What every rank returns, or the InputError it raises. One that raises alone leaves others waiting: they fail."""
    desk, barrier = [None] * num, threading.Barrier(num, timeout=20)

    def of(rank: int) -> Any:
        try:
            return work(Thread(rank=rank, num=num, desk=desk, barrier=barrier))
        except InputError as error:
            return error

    with ThreadPoolExecutor(num) as threads:
        return list(threads.map(of, range(num)))


@pytest.mark.parametrize("at_once", [3, 512])
@pytest.mark.parametrize("num", [2, 3])
def test_each_rank_encodes_its_share_and_all_have_all(
    num: int, at_once: int, tiny_data: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the last examples are fewer than the ranks, or not a multiple."""
    processor, examples = Phi3VProcessor.from_pretrained(tiny_model_dir), read_jsonl(tiny_data)
    encoded, encode = list[str](), feed.encode

    def counted(example: Example, *arguments: Any) -> Any:
        encoded.append(example.id)
        return encode(example, *arguments)

    monkeypatch.setattr(feed, "encode", counted)
    monkeypatch.setattr(feed, "ENCODED_AT_ONCE", at_once)
    for count in (14, 13, 10, 1):
        encoded.clear()
        for read, found in together(num, lambda ranks: encode_all(examples[:count], processor, ranks)):  # noqa: B023
            assert list(read) == examples[:count]
            assert [one.id for one in found] == [example.id for example in examples[:count]]
        assert sorted(encoded) == sorted(example.id for example in examples[:count]), "each once"


def test_what_one_rank_cannot_do_all_say(
    tiny_data: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a rank that waits for another: an unreadable line, a full disk, another file."""
    processor, examples = Phi3VProcessor.from_pretrained(tiny_model_dir), read_jsonl(tiny_data)
    monkeypatch.setattr(feed, "ENCODED_AT_ONCE", 2)

    def broken_after(count: int) -> Iterator[Example]:
        yield from examples[:count]
        raise InputError("train.jsonl:8: input/output error")

    def said(of_second: Callable[[], Any]) -> list[str]:
        work = lambda ranks: encode_all(of_second() if ranks.rank == 1 else iter(examples), processor, ranks)  # noqa: E731
        found = together(2, work)
        assert all(isinstance(error, InputError) for error in found)
        return [str(error) for error in found]

    assert said(lambda: broken_after(7)) == ["train.jsonl:8: input/output error"] * 2
    other = "--train is not the same for all ranks: after 4 examples they read [4, 1]"
    assert said(lambda: iter(examples[:5])) == [other] * 2

    extend, made = OnDisk.extend, list[OnDisk[Any]]()

    def full_for_the_third(self: OnDisk[Any], items: Any) -> None:
        made.extend([self] if all(self is not other for other in made) else [])
        if made[2:3] == [self]:
            raise InputError("/tmp: No space left on device")
        extend(self, items)

    monkeypatch.setattr(OnDisk, "extend", full_for_the_third)
    assert said(lambda: iter(examples)) == ["/tmp: No space left on device"] * 2


def test_examples_and_their_encoding_stay_on_disk(settings_for: MAKE, tiny_data: Path, tmp_path: Path) -> None:
    """What stays in memory of an example is a few numbers."""
    lines = tiny_data.read_text().splitlines()
    used = []
    for times in (20, 120):
        (tmp_path / "many.jsonl").write_text("\n".join(lines * times))
        run = settings_for(train=tmp_path / "many.jsonl", image_root=tiny_data.parent / "images")
        data_of(run)  # what is loaded once
        tracemalloc.start()
        data = data_of(run)
        used.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert len(data.encoded) == 14 * times
    assert (used[1] - used[0]) / (100 * 14) < 300, used


@pytest.mark.parametrize(
    ("cores", "processes", "expected"), [(1, 1, 0), (2, 1, 0), (3, 1, 2), (64, 1, 4), (8, 4, 0), (64, 8, 4)]
)
def test_workers_where_there_are_cores_for_them(
    cores: int, processes: int, expected: int, settings_for: MAKE, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One core is left for the loop, of those that a process has to itself."""
    monkeypatch.setattr(pool.os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert data_of(settings_for(num_workers=None)).reading.num_workers == expected
    assert data_of(settings_for(num_workers=3)).reading.num_workers == 3


# -- the steps -------------------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_is_fed_what_it_would_have_been(settings_for: MAKE) -> None:
    """From every step, over the borders of two epochs, which differ."""
    data = data_of(settings_for(max_tokens_per_pack=700))
    whole = fed(data, 0, 10)
    assert len(whole) == 10
    assert any(len(packs) > 1 for packs in whole)
    assert whole[:4] != whole[4:8]
    for first_step in range(1, 11):
        assert fed(data, first_step, 10) == whole[first_step:]


def test_the_examples_of_a_step_are_known_without_reading_them(settings_for: MAKE) -> None:
    """By rank, in any epoch: what an error names."""
    data = data_of(settings_for(max_tokens_per_pack=700))
    for step, packs in enumerate(fed(data, 0, 6)):
        assert data.examples_of(step, 1) == [[name for pack in packs for name in pack]]
        by_rank = data.examples_of(step, 2)
        assert len(by_rank) == 2
        assert sorted(name for names in by_rank for name in names) == sorted(name for pack in packs for name in pack)


def test_a_step_tells_what_it_was(settings_for: MAKE) -> None:
    step = next(steps(data_of(settings_for(max_tokens_per_pack=700)), ALONE, first_step=2))
    packs = [micro.pack for micro in step.packs()]
    step.wait = 0.5
    tokens = sum(pack.tokens for pack in packs)
    assert step.counts(4.0) == {
        "epoch": 0.75,
        "examples": 4,
        "pages": step.first.step.pages,
        "tokens": tokens,
        "crops": sum(pack.crops for pack in packs),
        "packs": len(packs),
        "examples_per_s": 1.0,
        "pages_per_s": step.first.step.pages / 4,
        "tokens_per_s": tokens / 4,
        "data_wait": 0.125,
        "seconds": 4.0,
    }


# -- what cannot be read ---------------------------------------------------------------------------------------------


@pytest.fixture
def broken(settings_for: MAKE, tiny_data: Path, tmp_path: Path) -> TrainingData:
    """One step of everything in several packs; the red picture was readable when the data was read."""
    shutil.copytree(tiny_data.parent, tmp_path / "data")
    flags = {"batch_size": 14, "max_tokens_per_pack": 350, "on_bad_example": "skip"}
    data = data_of(settings_for(train=tmp_path / "data" / tiny_data.name, **flags))
    (tmp_path / "data/images/red.png").write_bytes(b"gone")
    return data


def red(data: TrainingData) -> set[str]:
    return {example.id for example in data.encoded if any("red" in image for image in example.images)}


def total_weight(packs: Sequence[MicroBatch]) -> float:
    return float(torch.cat([micro.pack.loss_weights for micro in packs]).double().sum())


def test_the_others_weigh_for_what_is_lost(broken: TrainingData) -> None:
    data = broken
    step = next(steps(data, ALONE, first_step=0))
    packs = list(step.packs())
    assert {lost.id for lost in step.lost} == red(data)
    assert {name for micro in packs for name in micro.pack.ids} == {example.id for example in data.encoded} - red(data)
    assert total_weight(packs) == pytest.approx(1)
    of = {name: 0.0 for micro in packs for name in micro.pack.ids}
    for micro in packs:
        for branch, weight in zip(micro.pack.branch.tolist(), micro.pack.loss_weights.tolist(), strict=True):
            of[micro.pack.ids[branch]] += weight
    assert list(of.values()) == pytest.approx([1 / len(of)] * len(of)), "all alike"
    assert step.counts(1.0)["examples"] == 14 - len(red(data))
    assert [micro.last for micro in packs] == [False] * (len(packs) - 1) + [True]


@pytest.mark.parametrize("rank", [0, 1])
def test_what_another_rank_has_lost_counts(rank: int, broken: TrainingData) -> None:
    """Both scale by what is left on both: together the weights are one."""
    data = broken

    def packs_of(rank: int) -> list[MicroBatch]:
        return list(training_packs(data.encoded, data.schedule(0), data.reading, rank=rank, num_ranks=2))

    mine, others = packs_of(rank), packs_of(1 - rank)
    lost = [[lost for micro in packs for lost in micro.lost] for packs in (mine, others)]
    rest = 1 - sum(one.weight for some in lost for one in some)
    step = StepPacks(first=mine[0], rest=iter(mine[1:]), epoch=1.0, images=True)
    step = step.without_lost(Two(rank=rank, others=lost[1]))
    assert {one.id for one in step.lost} == red(data)
    assert total_weight(list(step.packs())) == pytest.approx(total_weight(mine) / rest)
    assert total_weight(mine) + total_weight(others) == pytest.approx(rest)


def test_nothing_changes_where_nothing_is_lost(settings_for: MAKE) -> None:
    """Bit for bit, whether skipping is allowed or not."""
    found = []
    for what_then in ("stop", "skip"):
        data = data_of(settings_for(max_tokens_per_pack=700, on_bad_example=what_then))
        fed_steps = steps(data, ALONE, first_step=0)
        found.append([micro.pack for step in fed_steps for micro in step.packs()])
    assert len(found[0]) == len(found[1]) > 4
    for a, b in zip(*found, strict=True):
        assert a.ids == b.ids
        assert torch.equal(a.loss_weights, b.loss_weights)
        assert torch.equal(a.tiles, b.tiles)


def test_a_step_that_has_lost_all_its_images_has_none(broken: TrainingData) -> None:
    """What only images reach sleeps through it, as through any other text."""
    data = broken
    for names, images in ({"e0", "e12"}, False), ({"e0", "e3", "e12"}, True):
        encoded = [example for example in data.encoded if example.id in names]
        settings = replace(data.settings, batch_size=len(encoded))
        some = replace(data, encoded=encoded, lengths=Lengths.of(encoded), settings=settings, steps_per_epoch=1)
        (step,) = steps(replace(some, total_steps=1), ALONE, first_step=0)
        assert [lost.id for lost in step.lost] == ["e0"]
        assert step.images is images
        assert step.first.step.crops > 0


def test_with_stop_it_is_an_error_that_names_example_and_file(broken: TrainingData) -> None:
    data = replace(broken, reading=replace(broken.reading, on_bad_example="stop"))
    found = steps(data, ALONE, first_step=0)
    with pytest.raises(InputError, match=r"train\.jsonl:\d+: example e\d+: .*red\.png"):
        list(chain.from_iterable(step.packs() for step in found))
