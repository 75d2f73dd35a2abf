"""The data of the loop: the examples of a run, and step after step its packs."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from rich.markup import escape

from phi3v.base.config import Run
from phi3v.base.console import say
from phi3v.base.errors import InputError
from phi3v.base.hardware import pick_tokens_per_pack
from phi3v.base.pool import num_cores
from phi3v.base.ranks import Ranks
from phi3v.base.runfolder import RunFolder
from phi3v.data.check import changed_images, check, counted, overlap
from phi3v.data.encode import Encoded, Example, encode, questions
from phi3v.data.processor import Phi3VProcessor
from phi3v.data.schema import NAMES_KEPT, image_folder, iter_jsonl
from phi3v.data.statistics import Statistics
from phi3v.infer.answering import Scoring, evenly
from phi3v.infer.metrics import pick_metrics
from phi3v.model.configuration import Phi3VConfig
from phi3v.packing.loader import MicroBatch, Reading, training_packs
from phi3v.packing.ondisk import OnDisk
from phi3v.packing.pack import Lost
from phi3v.packing.schedule import EpochSchedule, ScheduleSettings, schedule_epoch, schedule_evaluation
from phi3v.packing.trees import Lengths, PackLimits


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """A file of `--eval`."""

    name: str
    encoded: Sequence[Encoded]
    lengths: Lengths
    settings: ScheduleSettings
    questions: list[Example]
    metrics: tuple[str, ...]

    def schedule(self, limit: int | None) -> EpochSchedule:
        """What the validation loss is computed on: all examples, or `limit` of them, evenly spread."""
        chosen = np.array(evenly(range(len(self.lengths)), limit))
        return schedule_evaluation(self.lengths, self.settings, chosen)


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The examples of a run, their schedule, and what it is evaluated on."""

    examples: Sequence[Example]
    encoded: Sequence[Encoded]
    lengths: Lengths
    settings: ScheduleSettings
    reading: Reading
    seed: int
    steps_per_epoch: int
    total_steps: int
    eval_sets: tuple[EvalSet, ...]
    scoring: Scoring
    warnings: Sequence[str] = ()
    """What is odd in the data of a new run."""
    contents: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Digest and fingerprint of the images of a new run, by path."""

    def schedule(self, epoch: int) -> EpochSchedule:
        """The optimizer steps of an epoch."""
        return schedule_epoch(self.lengths, self.settings, seed=self.seed, epoch=epoch)

    def examples_of(self, step: int, num_ranks: int) -> list[list[str]]:
        """Ids of the examples of a step, the first being 0, by rank."""
        epoch, within = divmod(step, self.steps_per_epoch)
        _, packs = self.schedule(epoch).packs(within, num_ranks)
        return [[self.encoded[i].id for pack in of_rank for tree in pack for i in tree.examples] for of_rank in packs]

    @property
    def image_sizes(self) -> dict[str, tuple[int, int]]:
        """Padded (h, w) of every image, by path."""
        return {
            image: size
            for example in self.encoded
            for image, size in zip(example.images, example.image_sizes, strict=True)
        }

    def statistics(self) -> dict[str, Any]:
        """Statistics of the training examples, as the run folder keeps them for the report."""
        lengths = self.lengths
        columns = {"tokens": lengths.tokens, "answer tokens": lengths.num_targets, "crops": lengths.crops}
        return {name: asdict(Statistics.of(column)) for name, column in columns.items()}


def read_data(
    run: Run, processor: Phi3VProcessor, config: Phi3VConfig, *, check_first: bool, ranks: Ranks
) -> TrainingData:
    """Reads and encodes `--train` and `--eval`.

    `check_first`, for a new run, raises InputError for the first problem in either file. A resumed run takes the image
    sizes it began with from its folder instead, so that its schedule is the same whatever has become of the files.
    """
    warnings, contents = _check(run, processor, config, ranks) if check_first else ([], {})
    # A run that resumes plans with the image sizes it began with, whatever has become of the files.
    known = {} if check_first else _images_before(run, ranks)
    sizes = {image: (w, h) for image, (h, w) in known.items()}  # padded sizes, which are padded no further
    counts = [0] * len(run.data.train_files)

    def learnt() -> Iterator[Example]:
        for number, file in enumerate(run.data.train_files):
            for example in iter_jsonl(file, run.data.image_root):
                counts[number] += 1
                yield example

    examples, encoded = encode_all(learnt(), processor, ranks, sizes)
    lengths, mix = Lengths.of(encoded), tuple(zip(counts, run.data.train_files.values(), strict=True))
    settings = ScheduleSettings(
        batch_size=run.data.batch_size,
        questions=run.data.questions,
        weighting=run.data.weighting,
        limits=PackLimits(
            max_tokens_per_pack=pick_tokens_per_pack(run.data.max_tokens_per_pack, ranks.device),
            max_crops_per_pack=run.data.max_crops_per_pack,
            original_max=config.original_max_position_embeddings,
            share_prefix=run.data.share_prefix,
            pack=run.data.pack,
        ),
        mix=mix if {weight for _, weight in mix} != {1.0} else (),
    )
    reading = Reading(
        image_token_id=processor.image_token_id,
        num_crops=processor.num_crops,
        rules=processor.rules,
        num_workers=_num_workers(run.data.num_workers),
        pin_memory=torch.cuda.is_available(),
        on_bad_example=run.data.on_bad_example,
    )
    eval_sets = []
    for name, file in run.data.eval_files.items():
        asked, encoded_too = encode_all(iter_jsonl(file, run.data.image_root), processor, ranks, flag="--eval")
        prompts = [question for example in asked for question in questions(example)]
        eval_sets.append(
            EvalSet(
                name=name,
                encoded=encoded_too,
                lengths=Lengths.of(encoded_too),
                settings=settings,
                questions=prompts,
                metrics=pick_metrics(run.evaluation.metrics, prompts),
            )
        )
    steps_per_epoch = len(schedule_epoch(lengths, settings, seed=run.keeping.seed, epoch=0))
    return TrainingData(
        examples=examples,
        encoded=encoded,
        lengths=lengths,
        settings=settings,
        reading=reading,
        seed=run.keeping.seed,
        steps_per_epoch=steps_per_epoch,
        total_steps=run.optim.max_steps or max(1, round(run.optim.epochs * steps_per_epoch)),
        eval_sets=tuple(eval_sets),
        scoring=Scoring.of(run.evaluation.score, run.evaluation.labels, examples),
        warnings=warnings,
        contents=contents,
    )


def _check(
    run: Run, processor: Phi3VProcessor, config: Phi3VConfig, ranks: Ranks
) -> tuple[list[str], dict[str, tuple[int, int]]]:
    """All warnings about the files, which are printed, and `TrainingData.contents`."""
    checked = []
    for file in (*run.data.train_files, *run.data.eval_files.values()):
        findings = check(
            file,
            run.data.image_root,
            processor,
            max_tokens=config.max_position_embeddings,
            progress=run.keeping.progress,
            ranks=ranks,
        )
        if findings.problems:
            left = len(findings.problems) - 1
            more = f" (and {left} more: phi3v check {file})" if left else ""
            raise InputError(f"{findings.problems[0]}{more}")
        checked.append(findings)
    num_files = len(run.data.train_files)
    learnt, asked = checked[:num_files], checked[num_files:]
    shared = [warning for one in asked for other in learnt for warning in overlap(one, other)]
    warnings = [*(warning for findings in checked for warning in findings.warnings), *shared]
    for warning in warnings:
        say(f"[yellow]warning[/]     {escape(warning)}")
    return warnings, {
        image: (info.digest, findings.fingerprints[image])
        for findings in learnt
        for image, info in findings.files.items()
    }


def _images_before(run: Run, ranks: Ranks) -> dict[str, tuple[int, int]]:
    """Padded (h, w) of the training images when the run began, by their paths now.

    Raises InputError if the content of an image has changed, or prints it with `--on-bad-example skip`.
    """
    root = image_root(run)
    images = {os.path.join(root, name): entry for name, entry in RunFolder(run.keeping.out).images.items()}
    if changed := changed_images(images, root, progress=run.keeping.progress, ranks=ranks):
        what = f"{counted(len(changed), 'image')} changed since the run began, such as {changed[0]}"
        if run.data.on_bad_example == "stop":
            raise InputError(f"--resume: {what}; put them back, or start a new run")
        say(f"[yellow]note[/]        {escape(what)}")
    return {path: (entry[0], entry[1]) for path, entry in images.items()}


def image_root(run: Run) -> str:
    """The folder that holds all training images, links followed, with a slash at its end."""
    folders = [os.path.realpath(image_folder(file, run.data.image_root)) for file in run.data.train_files]
    return os.path.join(os.path.commonpath(folders), "")


ENCODED_AT_ONCE = 512
"""Examples of a rank between two exchanges; those of all ranks are in memory, however many there are on disk."""


def encode_all(
    examples: Iterable[Example],
    processor: Phi3VProcessor,
    ranks: Ranks,
    known: Mapping[str, tuple[int, int]] = MappingProxyType({}),
    *,
    flag: str = "--train",
) -> tuple[OnDisk[Example], OnDisk[Encoded]]:
    """The examples, as they are and encoded. Each rank encodes its share, which includes reading the headers of the
    images, and receives the others'. `known` holds (width, height) of images whose headers need not be read.

    Raises InputError, on all ranks, for what any of them cannot read or keep, and when they do not read the same.
    """

    @functools.lru_cache(NAMES_KEPT)  # a page has many questions
    def sizes(image: str) -> tuple[int, int]:
        return known[image] if image in known else processor.read_size(image)

    left = iter(examples)

    def next_share() -> tuple[list[Example], list[Encoded]]:
        some = list(islice(left, ENCODED_AT_ONCE * ranks.num))
        return some, [encode(example, processor, sizes) for example in some[ranks.rank :: ranks.num]]

    def keep(some: list[Example], whole: list[Any]) -> None:
        read.extend(some)
        encoded.extend(whole)

    read, encoded = ranks.all_do(lambda: (OnDisk[Example](), OnDisk[Encoded]()))
    while True:
        some, mine = ranks.all_do(next_share)
        counts = [count for (count,) in ranks.gather([len(some)])]
        if len(set(counts)) > 1:
            raise InputError(f"{flag} is not the same for all ranks: after {len(read):,} examples they read {counts}")
        if not some:
            return read, encoded
        whole: list[Any] = [None] * len(some)
        for rank, share in enumerate(ranks.gather(mine)):
            whole[rank :: ranks.num] = share
        ranks.all_do(functools.partial(keep, some, whole))


def _num_workers(wanted: int | None) -> int:
    if wanted is not None:
        return wanted
    return 0 if num_cores() <= 2 else min(4, num_cores() - 1)


@dataclass(kw_only=True)
class StepPacks:
    """The packs of one optimizer step on this rank, the time spent waiting for them, and what could not be read."""

    first: MicroBatch
    rest: Iterator[MicroBatch]
    epoch: float
    """Epochs that are done after the step."""
    images: bool
    """Whether any example of the step, on any rank, has an image."""
    wait: float = 0.0
    lost: list[Lost] = field(default_factory=list)
    """Examples of the step, on all ranks, that are skipped; the others' weights make up for them."""

    def packs(self) -> Iterator[MicroBatch]:
        yield (micro := self.first)
        while not micro.last:
            before = time.monotonic()
            micro = next(self.rest)
            self.wait += time.monotonic() - before
            yield micro

    def without_lost(self, ranks: Ranks) -> StepPacks:
        """The step with all its packs read, and their weights such that the loss is the mean over what was read."""
        packs = list(self.packs())
        self.lost = [lost for found in ranks.gather([lost for micro in packs for lost in micro.lost]) for lost in found]
        if len(self.lost) == self.first.step.examples:
            raise InputError(f"no example of a step can be read: {self.lost[0].where}: {self.lost[0].reason}")
        if self.lost:
            left = 1.0 - sum(lost.weight for lost in self.lost)
            packs = [m._replace(pack=replace(m.pack, loss_weights=m.pack.loss_weights / left)) for m in packs]
            self.images = ranks.any(any(micro.pack.crops for micro in packs))
        self.first, self.rest = packs[0], iter(packs[1:])
        return self

    def counts(self, seconds: float) -> dict[str, Any]:
        """What a step of so many seconds has processed, for its line in `log.jsonl`.

        `data_wait` is the share of the time spent waiting for data.
        """
        step = self.first.step
        examples = step.examples - len(self.lost)
        return {
            "epoch": round(self.epoch, 4),
            "examples": examples,
            "pages": step.pages,
            "tokens": step.tokens,
            "crops": step.crops,
            "packs": step.packs,
            "examples_per_s": examples / seconds,
            "pages_per_s": step.pages / seconds,
            "tokens_per_s": step.tokens / seconds,
            "data_wait": self.wait / seconds,
            "seconds": seconds,
        }


def steps(data: TrainingData, ranks: Ranks, *, first_step: int) -> Iterator[StepPacks]:
    """The optimizer steps from `first_step` (from 0) to the last, over as many epochs as it takes."""

    def every_pack() -> Iterator[MicroBatch]:
        epoch, within = divmod(first_step, data.steps_per_epoch)
        while True:
            schedule = data.schedule(epoch)
            yield from training_packs(
                data.encoded, schedule, data.reading, first_step=within, rank=ranks.rank, num_ranks=ranks.num, log=say
            )
            epoch, within = epoch + 1, 0

    stream = ranks.own(every_pack())
    for step in range(first_step + 1, data.total_steps + 1):
        before = time.monotonic()
        first = next(stream)
        wait, epoch = time.monotonic() - before, step / data.steps_per_epoch
        packs = StepPacks(first=first, rest=stream, epoch=epoch, images=first.step.crops > 0, wait=wait)
        yield packs.without_lost(ranks) if data.reading.on_bad_example == "skip" else packs
