"""What the loop is fed: the examples of a run, and step after step its packs."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from phi3v.config import Run
from phi3v.data.chat import Encoded, Example, encode
from phi3v.data.check import check
from phi3v.data.image import read_size
from phi3v.data.loader import MicroBatch, Reading, training_packs
from phi3v.data.plan import PlanSettings, plan_epoch
from phi3v.data.processor import Phi3VProcessor
from phi3v.data.schema import read_jsonl
from phi3v.data.tree import Lengths, PackLimits
from phi3v.errors import InputError
from phi3v.evaluate import read_questions
from phi3v.model.configuration import Phi3VConfig


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The examples of a run, what a plan must know of them, and the questions it is evaluated on."""

    examples: list[Example]
    encoded: list[Encoded]
    lengths: Lengths
    settings: PlanSettings
    reading: Reading
    steps_per_epoch: int
    questions: list[Example]

    def total_steps(self, run: Run) -> int:
        """Optimizer steps of the whole run."""
        if run.optim.max_steps is not None:
            return run.optim.max_steps
        return max(1, round(run.optim.epochs * self.steps_per_epoch))


def read_data(run: Run, processor: Phi3VProcessor, config: Phi3VConfig, *, check_first: bool) -> TrainingData:
    """Reads and encodes `--train` and `--eval`. With `check_first`, the first problem in either is an InputError."""
    assert run.data.train is not None
    if check_first:
        for file in filter(None, (run.data.train, run.data.eval)):
            findings = check(file, run.data.image_root, processor, max_tokens=config.max_position_embeddings)
            if findings.problems:
                more = (
                    f" (and {len(findings.problems) - 1} more: phi3v check {file})"
                    if len(findings.problems) > 1
                    else ""
                )
                raise InputError(f"{findings.problems[0]}{more}")
    examples = read_jsonl(run.data.train, run.data.image_root)
    sizes = functools.cache(read_size)  # a page has many questions
    encoded = [encode(example, processor, sizes) for example in examples]
    lengths = Lengths.of(encoded)
    settings = PlanSettings(
        batch_size=run.data.batch_size,
        questions=run.data.questions,
        weighting=run.data.weighting,
        limits=PackLimits(
            max_tokens_per_pack=run.data.max_tokens_per_pack,
            max_crops_per_pack=run.data.max_crops_per_pack,
            original_max=config.original_max_position_embeddings,
            share_prefix=run.data.share_prefix,
        ),
    )
    reading = Reading(
        image_token_id=processor.image_token_id,
        num_crops=processor.num_crops,
        num_workers=_num_workers(run.data.num_workers),
        pin_memory=torch.cuda.is_available(),
    )
    return TrainingData(
        examples=examples,
        encoded=encoded,
        lengths=lengths,
        settings=settings,
        reading=reading,
        steps_per_epoch=len(plan_epoch(lengths, settings, seed=run.keeping.seed, epoch=0)),
        questions=read_questions(run.data.eval, run.data.image_root) if run.data.eval else [],
    )


def _num_workers(wanted: int | None) -> int:
    if wanted is not None:
        return wanted
    cores = len(os.sched_getaffinity(0))
    return 0 if cores <= 2 else min(4, cores - 1)


@dataclass(kw_only=True)
class StepPacks:
    """The packs of one optimizer step, and how long each was waited for."""

    first: MicroBatch
    rest: Iterator[tuple[float, MicroBatch]]
    first_wait: float
    epoch: float
    wait: float = 0.0

    @property
    def crops(self) -> int:
        return self.first.step.crops

    def packs(self) -> Iterator[MicroBatch]:
        micro, self.wait = self.first, self.first_wait
        yield micro
        while not micro.last:
            waited, micro = next(self.rest)
            self.wait += waited
            yield micro

    def entry(
        self, step: int, loss: float, rate: float, norm: float, seconds: float, memory: float, skipped: bool
    ) -> dict[str, Any]:
        """The step's line in `log.jsonl`. `data_wait` is the share of the time spent waiting for data."""
        counts = self.first.step
        return {
            "step": step,
            "epoch": round(self.epoch, 4),
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "examples": counts.examples,
            "pages": counts.pages,
            "tokens": counts.tokens,
            "crops": counts.crops,
            "packs": counts.packs,
            "examples_per_s": counts.examples / seconds,
            "tokens_per_s": counts.tokens / seconds,
            "data_wait": self.wait / seconds,
            "seconds": seconds,
            "memory_gb": memory,
            **({"skipped": True} if skipped else {}),
        }


def steps(
    run: Run, data: TrainingData, device: torch.device, *, first_step: int, total_steps: int
) -> Iterator[StepPacks]:
    """The optimizer steps still to do, over as many epochs as it takes."""

    def timed() -> Iterator[tuple[float, MicroBatch]]:
        epoch, within = divmod(first_step, data.steps_per_epoch)
        while True:
            plan = plan_epoch(data.lengths, data.settings, seed=run.keeping.seed, epoch=epoch)
            packs = training_packs(data.encoded, plan, data.reading, first_step=within)
            before = time.monotonic()
            for micro in packs:
                yield time.monotonic() - before, micro
                before = time.monotonic()
            epoch, within = epoch + 1, 0

    stream = timed()
    for step in range(first_step, total_steps):
        wait, first = next(stream)
        yield StepPacks(first=first, rest=stream, first_wait=wait, epoch=(step + 1) / data.steps_per_epoch)
