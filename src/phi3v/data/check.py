"""Validation of a whole data file before anything is trained on it: every problem at once, and what the data is like.

Each image is decoded once, however many examples show it; each example goes through the encode path of training.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from phi3v.base.errors import InputError, one_line
from phi3v.data.encode import Example, answer_text, encode, user_text
from phi3v.data.image import MAX_PIXELS, Picture, hd_size, num_tiles, read_picture
from phi3v.data.processor import Phi3VProcessor
from phi3v.data.schema import Notes, image_resolver, lines, parse

SMALL = 500  # with fewer examples and images than this, starting worker processes takes longer than it saves
CONTROL_TOKEN = re.compile(r"<\|(?:user|assistant|system|end|endoftext|placeholder\d+)\|>|</?s>|<unk>")

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of one number per example. The histogram is (lowest value, number of examples) of bins of equal width."""

    mean: float
    p50: int
    p95: int
    max: int
    histogram: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, numbers: ArrayLike, num_bins: int = 12) -> Statistics:
        values = np.asarray(numbers, dtype=np.int64)
        low, high = int(values.min()), int(values.max())
        width = -(-(high - low + 1) // num_bins)
        counts = np.bincount((values - low) // width).tolist()
        p50, p95 = np.percentile(values, [50, 95], method="inverted_cdf").tolist()
        histogram = tuple((low + k * width, count) for k, count in enumerate(counts))
        return cls(mean=float(values.mean()), p50=p50, p95=p95, max=high, histogram=histogram)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What `check` found. `problems` and `warnings` are "file:line: what is wrong", in the order of the file.

    The last warnings may be about image files: how many there are of a kind, and which is the first.

    Counts are of the lines that hold an example (`images` counts appearances, `image_files` files). Statistics are of
    the examples without a problem; None if there are none, and, of tokens, if no processor was given.
    """

    path: str
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    bad_lines: int
    examples: int
    turns: int
    images: int
    image_files: int
    text_only: int
    tokens: Statistics | None
    answer_tokens: Statistics | None
    crops: Statistics | None
    lines: tuple[Checked, ...] = field(repr=False, compare=False)

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def statistics(self) -> dict[str, Statistics]:
        """Those that there are, by name."""
        every = {"tokens": self.tokens, "answer tokens": self.answer_tokens, "crops": self.crops}
        return {name: one for name, one in every.items() if one is not None}


class Checked(NamedTuple):
    """A line of a data file: "file:line", its example if it holds one, and what was found."""

    where: str
    example: Example | None
    notes: Notes
    measure: Measure | None
    """None with a problem."""


def check(
    path: str | Path,
    image_root: str | Path | None = None,
    processor: Phi3VProcessor | None = None,
    *,
    num_crops: int = 4,
    max_tokens: int | None = None,
    max_pixels: int = MAX_PIXELS,
    num_workers: int | None = None,
    console: Console | None = None,
) -> Findings:
    """Everything that is wrong with a data file, its statistics, and line by line what they are made of.

    processor     counts the tokens and brings its num_crops; without one, `num_crops` holds and no tokens are counted
    max_tokens    more in one example are a problem
    num_workers   processes besides this one: by default one per core, none for a small file
    console       shows the progress, if it is a terminal; by default standard error

    Raises InputError only if the file cannot be read or the given `image_root` is no folder.
    """
    resolve = image_resolver(path, image_root)
    parsed: list[tuple[str, Example | None, Notes]] = []
    for where, line in lines(path):
        notes = Notes()
        parsed.append((where, parse(line, where, resolve, notes), notes))
    examples = [(example, notes) for _, example, notes in parsed if example is not None]
    _note_repeated_ids(examples)

    images = sorted({image for example, _ in examples for image in example.images if image})
    examiner = Examiner(processor, processor.num_crops if processor else num_crops, max_tokens, max_pixels)
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0)) if len(examples) + len(images) >= SMALL else 0
    measures: dict[str, Measure] = {}
    with _executor(examiner, num_workers) as executor:
        run = _Run(executor, console or Console(stderr=True))
        pictures = dict(zip(images, run("images", _picture, images, chunk=8), strict=True))
        about_files = list(_about_files(str(path), pictures))
        pictures[""] = Picture((1, 1), rotated=False, animated=False)  # a refused path, noted already
        jobs = [(example, {image: pictures[image] for image in example.images}) for example, _ in examples]
        results = run("examples", _examine, jobs, chunk=256)
        for (example, notes), (found, measure) in zip(examples, results, strict=True):
            notes.problems += found.problems
            notes.warnings += found.warnings
            if not notes.problems:
                measures[example.where] = measure
    checked = [Checked(where, example, notes, measures.get(where)) for where, example, notes in parsed]
    return _findings(str(path), checked, about_files, len(images), has_tokens=processor is not None)


def _findings(
    path: str, checked: Sequence[Checked], about_files: Sequence[str], num_files: int, *, has_tokens: bool
) -> Findings:
    problems = [f"{line.where}: {problem}" for line in checked for problem in line.notes.problems]
    warnings = _condensed((line.where, text) for line in checked for text in line.notes.warnings)
    examples = [line.example for line in checked if line.example is not None]
    measures = [line.measure for line in checked if line.measure is not None]
    tokens, answer_tokens, crops = zip(*measures, strict=True) if measures else ((), (), ())
    return Findings(
        path=path,
        problems=tuple(map(one_line, problems if checked else [f"{path}: no examples"])),
        warnings=tuple(map(one_line, [*warnings, *about_files])),
        bad_lines=sum(bool(line.notes.problems) for line in checked),
        examples=len(examples),
        turns=sum(len(example.turns) for example in examples),
        images=sum(len(example.images) for example in examples),
        image_files=num_files,
        text_only=sum(not example.images for example in examples),
        tokens=Statistics.of(tokens) if measures and has_tokens else None,
        answer_tokens=Statistics.of(answer_tokens) if measures and has_tokens else None,
        crops=Statistics.of(crops) if measures else None,
        lines=tuple(checked),
    )


def render(findings: Findings, console: Console) -> None:
    """Prints warnings and problems, one on each line, then counts, statistics and histograms, then the verdict."""
    for text in findings.warnings:
        console.print(Text.assemble(text, (" (warning)", "yellow")), soft_wrap=True)
    for text in findings.problems:
        console.print(Text(text, style="red"), soft_wrap=True)
    counts = {
        "examples": findings.examples,
        "turns": findings.turns,
        "images": findings.images,
        "image files": findings.image_files,
        "text-only": findings.text_only,
    }
    console.print("  ".join(f"[bold]{number:,}[/] {name}" for name, number in counts.items()), highlight=False)
    if statistics := findings.statistics:
        table = Table("per example", box=None, header_style="dim", pad_edge=False, padding=(0, 3, 0, 0))
        for name in ("mean", "p50", "p95", "max"):
            table.add_column(name, justify="right")
        for name, one in statistics.items():
            table.add_row(name, f"{one.mean:,.1f}", *(f"{number:,}" for number in (one.p50, one.p95, one.max)))
        console.print(table)
    for name in ("tokens", "crops"):
        if name in statistics:
            console.print(_histogram(name, statistics[name].histogram))
    if findings.ok:
        console.print(Text(f"✓ {findings.path} is fit for training", style="bold green"))
    else:
        number, bad = counted(len(findings.problems), "problem"), counted(findings.bad_lines, "line")
        console.print(Text(f"✗ {findings.path}: {number} on {bad}", style="bold red"))


def _histogram(name: str, histogram: Sequence[tuple[int, int]], width: int = 40) -> Table:
    table = Table(name, "", "examples", box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    table.columns[0].justify = table.columns[2].justify = "right"
    most = max(count for _, count in histogram)
    for low, count in histogram:
        eighths = -(-count * width * 8 // most)  # rounded up: a bin with an example in it shows
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
        table.add_row(f"{low:,}", Text(bar, style="cyan"), f"{count:,}")
    return table


# --- the work of one process ------------------------------------------------------------------------------------------


class Measure(NamedTuple):
    """Of an example; tokens are 0 where none are counted."""

    tokens: int
    answer_tokens: int
    crops: int


@dataclass(frozen=True)
class Examiner:
    """Looks at images and examples, one at a time."""

    processor: Phi3VProcessor | None
    num_crops: int
    max_tokens: int | None
    max_pixels: int

    def picture(self, path: str) -> Picture | str:
        """What an image file holds that training can use; what is wrong with any other."""
        try:
            picture = read_picture(path, self.max_pixels)
            hd_size(*picture.size, self.num_crops)
        except InputError as error:
            text = str(error)
            return text if text.startswith(path) else f"{path}: {text}"
        return picture

    def examine(self, example: Example, pictures: dict[str, Picture | str]) -> tuple[Notes, Measure]:
        """What is wrong with an example, given what `picture` said of its images, and how large it is."""
        notes = Notes(problems=[wrong for wrong in pictures.values() if isinstance(wrong, str)])
        sizes = {image: picture.size for image, picture in pictures.items() if isinstance(picture, Picture)}
        earlier = 0
        for number, turn in enumerate(example.turns, start=1):
            with _noted(notes, number):
                user_text(turn, earlier)
            with _noted(notes, number):
                answer_text(turn.assistant or "")
            for token in sorted(set(CONTROL_TOKEN.findall(f"{turn.user} {turn.assistant}"))):
                notes.warnings.append(f"turn {number}: the model will read {token} in the text as a control token")
            earlier += len(turn.images)
        if notes.problems:
            return notes, Measure(0, 0, 0)
        if self.processor is None:
            hd_sizes = [hd_size(*sizes[image], self.num_crops) for image in example.images]
            return notes, Measure(0, 0, sum(num_tiles(h, w) + 1 for h, w in hd_sizes))
        try:
            encoded = encode(example, self.processor, sizes.__getitem__)
        except InputError as error:
            notes.problems.append(str(error).removeprefix(f"{example.where}: "))
            return notes, Measure(0, 0, 0)
        if self.max_tokens is not None and encoded.tokens > self.max_tokens:
            notes.problems.append(f"{encoded.tokens:,} tokens, more than {self.max_tokens:,}")
        return notes, Measure(encoded.tokens, encoded.num_supervised, encoded.crops)


@contextlib.contextmanager
def _noted(notes: Notes, turn: int) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        notes.problems.append(f"turn {turn}: {error}")


# A pool's functions are found by name in the worker, and the examiner (its tokenizer takes long to send) is there once.


_examiner: Examiner


def _start(examiner: Examiner) -> None:
    global _examiner
    _examiner = examiner


def _picture(path: str) -> Picture | str:
    return _examiner.picture(path)


def _examine(job: tuple[Example, dict[str, Picture | str]]) -> tuple[Notes, Measure]:
    return _examiner.examine(*job)


@contextlib.contextmanager
def _executor(examiner: Examiner, num_workers: int) -> Iterator[Executor | None]:
    """A pool of processes that run the examiner; None for zero workers, this process then being ready for it."""
    if num_workers == 0:
        _start(examiner)
        yield None
        return
    # Forked, not spawned: importing torch and transformers takes each worker longer than most files do.
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(num_workers, mp_context=fork, initializer=_start, initargs=(examiner,)) as executor:
        yield executor


@dataclass(frozen=True)
class _Run:
    """Calls a function for every item, in the pool or here, with a progress bar; results in the order of the items."""

    executor: Executor | None
    console: Console

    def __call__(
        self, name: str, function: Callable[[Item], Result], items: Sequence[Item], chunk: int
    ) -> Iterator[Result]:
        # The pool forks at its first map, which must come before the progress bar starts its thread.
        results = self.executor.map(function, items, chunksize=chunk) if self.executor else map(function, items)
        columns = (TextColumn("checking {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            yield from progress.track(results, total=len(items), description=name)


# --- notes ------------------------------------------------------------------------------------------------------------


def _note_repeated_ids(examples: Iterable[tuple[Example, Notes]]) -> None:
    first: dict[str, str] = {}
    for example, notes in examples:
        earlier = first.setdefault(example.id, example.where)
        if earlier != example.where:
            notes.warnings.append(f"id {example.id!r} is also on line {earlier.rpartition(':')[2]}")


def _condensed(warnings: Iterable[tuple[str, str]]) -> list[str]:
    """A warning that is the same on several lines is reported once."""
    lines: dict[str, list[str]] = {}
    for where, text in warnings:
        lines.setdefault(text, []).append(where)
    more = {text: counted(len(where) - 1, "more line") for text, where in lines.items()}
    return [f"{where[0]}: {text}" + f" (and {more[text]})" * (len(where) > 1) for text, where in lines.items()]


def _about_files(path: str, pictures: dict[str, Picture | str]) -> Iterator[str]:
    """Of what a viewer shows otherwise than the model sees it: the number of files, and the first."""
    readable = {file: picture for file, picture in pictures.items() if isinstance(picture, Picture)}
    if rotated := [file for file, picture in readable.items() if picture.rotated]:
        files = f"{counted(len(rotated), 'image file')} with an EXIF orientation ({rotated[0]}, for one)"
        yield f"{path}: {files}: it is not followed, the model sees them as they are stored"
    if animated := [file for file, picture in readable.items() if picture.animated]:
        files = f"{counted(len(animated), 'image file')} with several frames or pages ({animated[0]}, for one)"
        yield f"{path}: {files}: the model sees the first"


def counted(number: int, noun: str) -> str:
    """1 line, 2,000 lines."""
    return f"{number:,} {noun}" + "s" * (number != 1)
