"""Check a data file before training: find every problem at once, and measure what the data is like.

All ranks share the work, each with its worker processes, and of an example only a few numbers stay in memory. An image
is decoded once, however many lines show it, and not again until it changes (`data.stamp`).
"""

from __future__ import annotations

import hashlib
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from rich.bar import Bar
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from phi3v.base.console import progress_bar, say
from phi3v.base.errors import InputError, one_line
from phi3v.base.pool import forked_map, num_cores
from phi3v.base.ranks import ALONE, Ranks
from phi3v.data.encode import Example, encode, user_text, without_images
from phi3v.data.image import PUBLISHED, ImageInfo, ImageRules, content_digest, hd_size, num_tiles, read_info
from phi3v.data.processor import IMAGE_TAG, Phi3VProcessor
from phi3v.data.schema import Notes, image_folder, image_resolver, lines, parse
from phi3v.data.split import twins
from phi3v.data.stamp import fingerprint, inputs_of, read_stamp, write_stamp
from phi3v.data.statistics import Findings, Statistics
from phi3v.data.tags import PLACE

CONTROL_TOKEN = re.compile(r"<\|(?:user|assistant|system|end|endoftext|placeholder\d+)\|>|</?s>|<unk>")

FEW = 500
"""With fewer lines or images, starting worker processes takes longer than it saves."""

CHUNK = 16
"""Lines or images that a worker gets at once."""

PER_MEETING = 1024
"""Lines or images of a rank before it exchanges results with the others: seconds of work, so that none waits long."""

Item = TypeVar("Item")
Result = TypeVar("Result")
Images = Mapping[str, ImageInfo | str]
"""What images hold, by path, or what is wrong with them."""


def check(
    path: str | Path,
    image_root: str | Path | None = None,
    processor: Phi3VProcessor | None = None,
    *,
    num_crops: int = 4,
    rules: ImageRules = PUBLISHED,
    max_tokens: int | None = None,
    num_workers: int | None = None,
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> Findings:
    """Everything that is wrong with a data file, and its statistics; on several ranks they share the work.

    processor     counts the tokens, and brings its num_crops and rules; without one, no tokens are counted
    num_crops     tiles an image may be cut into, without a processor
    rules         how image files become pixels, without a processor
    max_tokens    more in one example are a problem
    num_workers   processes of this rank besides this one. Default: one per core, none for a small file

    What an earlier check found in order is not checked again until it changes. Raises InputError only if the file
    cannot be read or the given `image_root` is no folder.
    """
    data = Path(path)
    checker = ranks.all_do(lambda: Checker(data, image_root, processor, num_crops, rules, max_tokens))
    sight = f"{checker.num_crops} crops, {checker.rules}"
    num_lines, inputs, stamp = ranks.first_does(
        lambda: (sum(1 for _ in lines(path)), inputs_of(data, processor, sight), read_stamp(data))
    )
    share = partial(_shared, ranks=ranks, num_workers=num_workers, progress=progress)

    fingerprints: dict[str, int] = {}
    for found in share(checker.images_of, lines(path), "reading", "lines", num_lines):
        fingerprints |= found
    known = stamp.known_images if stamp else {}
    known_files = {image: known[n] for image, n in fingerprints.items() if n in known}
    images: dict[str, ImageInfo | str] = {**known_files}
    changed = sorted(fingerprints.keys() - images.keys())
    if stamp and not changed and (kept := stamp.findings_of(inputs, max_tokens)):
        examples = counted(kept.examples, "example")
        say(f"{escape(str(path))}: checked on {stamp.date}, nothing has changed: {examples}")
        return replace(kept, files=known_files, fingerprints=fingerprints)

    images |= zip(changed, share(_decode, changed, "checking images", "images", len(changed)), strict=True)
    tally = Tally(str(path))
    for line in share(partial(checker.summary, images=images), lines(path), "checking lines", "lines", num_lines):
        tally.add(line)
    findings = tally.findings(images, fingerprints, checker)
    if ranks.is_first:
        try:
            write_stamp(data, inputs, findings, {fingerprints[image]: info for image, info in findings.files.items()})
        except InputError as error:
            say(f"[yellow]note[/]  the next check starts from scratch: {escape(str(error))}")
    return findings


def changed_images(
    images: Mapping[str, Sequence[int]], root: str, *, progress: bool = True, ranks: Ranks = ALONE
) -> list[str]:
    """The images whose content is not the one that was kept; missing ones do not count.

    `images` holds (height, width, digest, fingerprint below `root`) by path. Only those with another fingerprint are
    read, and those without a digest are not compared.
    """

    def has_changed(image: str) -> bool:
        kept, now = images[image][2:], fingerprint(image, root)
        return bool(kept) and now not in (0, kept[1]) and content_digest(image) != kept[0]

    changed = _shared(
        has_changed, images, "comparing images", "images", len(images), ranks=ranks, num_workers=None, progress=progress
    )
    return [image for image, has in zip(images, changed, strict=True) if has]


def check_lines(
    path: str | Path,
    image_root: str | Path | None,
    processor: Phi3VProcessor | None,
    wanted: Set[int],
    *,
    num_crops: int = 4,
    rules: ImageRules = PUBLISHED,
) -> list[CheckedLine]:
    """Some lines of a data file in detail: the `wanted`, counted from 0 among those that are not blank."""
    checker, stamp = Checker(Path(path), image_root, processor, num_crops, rules), read_stamp(Path(path))
    known = stamp.known_images if stamp else {}
    found = []
    for number, line in enumerate(lines(path)):
        if number in wanted:
            images = {image: known.get(n) or _decode(image) for image, n in checker.images_of(line).items()}
            found.append(checker.check_line(line, images))
    return found


# -- the work of a process ---------------------------------------------------------------------------------------------


class Measure(NamedTuple):
    """Sizes of an example; tokens are 0 where none are counted."""

    tokens: int
    answer_tokens: int
    crops: int


class CheckedLine(NamedTuple):
    """A line of a data file, its example if it holds one, and what is wrong with it."""

    where: str
    raw: bytes
    example: Example | None
    notes: Notes
    measure: Measure | None
    """None with a problem."""
    about_images: Sequence[str]
    """What the model sees otherwise than a viewer shows it."""


class Summary(NamedTuple):
    """What is kept of a checked line. The counts are 0 if it holds no example."""

    where: str
    id: str
    turns: int
    images: int
    notes: Notes
    measure: Measure | None
    odd: bool
    """Whether there are warnings, about the line or its images."""
    key: int
    """64 bits that stand for the example: its texts, and the content of its images."""


class Checker:
    """Checks lines, ("file:line", content), one at a time, in whatever process."""

    def __init__(
        self,
        path: Path,
        image_root: str | Path | None,
        processor: Phi3VProcessor | None,
        num_crops: int,
        rules: ImageRules = PUBLISHED,
        max_tokens: int | None = None,
    ) -> None:
        self.resolve = image_resolver(path, image_root)
        self.root = os.path.join(os.path.realpath(image_folder(path, image_root)), "")
        self.processor = processor
        self.num_crops = processor.num_crops if processor else num_crops
        self.rules = processor.rules if processor else rules
        self.max_tokens = max_tokens

    def images_of(self, line: tuple[str, bytes]) -> dict[str, int]:
        """The images that a line shows, with their fingerprints."""
        where, raw = line
        example = parse(raw, where, self.resolve, Notes())
        return {image: fingerprint(image, self.root) for image in example.images if image} if example else {}

    def check_line(self, line: tuple[str, bytes], images: Images) -> CheckedLine:
        """The example on a line, what is wrong with it, and how large it is."""
        where, raw = line
        notes = Notes()
        example = parse(raw, where, self.resolve, notes)
        about = list[str]()
        if example is not None:
            self._check_images(example, images, notes)
            _check_texts(example, notes)
            shown = {image: info for image in example.images if isinstance(info := images.get(image), ImageInfo)}
            about = list(about_files(shown, self.root, self.rules))
        measure = self._measure(example, images, notes) if example and not notes.problems else None
        return CheckedLine(where, raw, example, notes, measure, about)

    def summary(self, line: tuple[str, bytes], images: Images) -> Summary:
        """What is kept of a line."""
        where, _, example, notes, measure, about = self.check_line(line, images)
        counts = (example.id, len(example.turns), len(example.images)) if example else ("", 0, 0)
        key = _key(example, images) if example and measure else 0
        return Summary(where, *counts, notes, measure, bool(notes.warnings or about), key)

    def _check_images(self, example: Example, images: Images, notes: Notes) -> None:
        for image in dict.fromkeys(filter(None, example.images)):  # "" is one that `parse` refused
            info = images[image]
            if isinstance(info, str):
                notes.problems.append(info)
            elif problem := _problem(hd_size, *info.seen(self.rules), self.num_crops):
                notes.problems.append(f"{image}: {problem}")

    def _measure(self, example: Example, images: Images, notes: Notes) -> Measure | None:
        sizes = {image: info.seen(self.rules) for image in example.images if not isinstance(info := images[image], str)}
        if self.processor is None:
            tiles = [num_tiles(*hd_size(*sizes[image], self.num_crops)) for image in example.images]
            return Measure(0, 0, sum(tiles) + len(tiles))
        encoded = encode(example, self.processor, sizes.__getitem__)
        if self.max_tokens is not None and encoded.tokens > self.max_tokens:
            notes.problems.append(f"{encoded.tokens:,} tokens, more than {self.max_tokens:,}")
            return None
        return Measure(encoded.tokens, encoded.num_targets, encoded.crops)


def _decode(image: str) -> ImageInfo | str:
    """What an image holds, or what is wrong with it."""
    try:
        return read_info(image)
    except InputError as error:
        return str(error)


def _key(example: Example, images: Images) -> int:
    shown = [info.digest for image in example.images if isinstance(info := images[image], ImageInfo)]
    said = [(turn.user, turn.assistant, len(turn.images)) for turn in example.turns]
    return int.from_bytes(hashlib.blake2b(repr((said, shown)).encode(), digest_size=8).digest(), "little")


def _check_texts(example: Example, notes: Notes) -> None:
    found = [("", example.system, _problem(without_images, example.system, "a system text"))]
    earlier = 0
    for number, turn in enumerate(example.turns, start=1):
        answer = turn.assistant or ""
        found.append((f"turn {number}: ", turn.user, _problem(user_text, turn, earlier)))
        found.append((f"turn {number}: ", answer, _problem(without_images, answer, "an answer")))
        earlier += len(turn.images)
    for name, text, problem in found:
        notes.problems += [f"{name}{problem}"] if problem else []
        for token in sorted(set(CONTROL_TOKEN.findall(text))):
            notes.warnings.append(f"{name}the model will read {token} in the text as a control token")
        for tag in sorted({match[0] for match in PLACE.finditer(IMAGE_TAG.sub("", text))}):
            notes.warnings.append(f"{name}{tag} is read as text: tags for images are <|image_1|>, <|image_2|>, ...")


def _problem(function: Callable[..., object], *arguments: object) -> str | None:
    """The message of the InputError that a call raises."""
    try:
        function(*arguments)
    except InputError as error:
        return str(error)
    return None


def _shared(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    title: str,
    unit: str,
    total: int,
    *,
    ranks: Ranks,
    num_workers: int | None,
    progress: bool,
) -> Iterator[Result]:
    """The results of a function for all items, in order, on every rank; each rank computes its share, with its workers.

    The progress has a title, and counts units up to `total`.
    """
    if num_workers is None:
        num_workers = num_cores() if total >= FEW else 0
    share = islice(items, ranks.rank, None, ranks.num)
    mine = ranks.all_do(lambda: forked_map(function, share, num_workers, chunk=CHUNK))
    with progress_bar(title, total, unit, show=progress, summary=False) as advance:
        while True:
            found = ranks.gather(ranks.all_do(lambda: list(islice(mine, PER_MEETING))))
            for result in chain.from_iterable(zip_longest(*found)):
                if result is not None:  # a later rank may have one less
                    advance(1)
                    yield result
            if len(found[0]) < PER_MEETING:
                return


# -- the sum of it -----------------------------------------------------------------------------------------------------


class Tally:
    """What is kept of all lines: counts, three numbers of each without a problem, and everything that is wrong."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.num_lines = 0
        self.counts = Counter(examples=0, turns=0, images=0, text_only=0)
        self.measures = [array("q") for _ in Measure._fields]
        self.keys = array("Q")
        self.problems: list[str] = []
        self.bad_lines: list[int] = []
        self.odd_lines: list[int] = []
        self.warnings: dict[str, tuple[str, int]] = {}  # by kind: the first one, and how many lines have it
        self.line_of: dict[str, int] = {}  # by id

    def add(self, line: Summary) -> None:
        for problem in line.notes.problems:
            self.problems.append(one_line(f"{line.where}: {problem}"))
        for warning in line.notes.warnings:
            self._warn(warning, f"{line.where}: {warning}")
        if line.notes.problems:
            self.bad_lines.append(self.num_lines)
        if line.odd:
            self.odd_lines.append(self.num_lines)
        if line.measure:
            self.keys.append(line.key)
            for numbers, number in zip(self.measures, line.measure, strict=True):
                numbers.append(number)
        if line.turns:
            self.counts.update(examples=1, turns=line.turns, images=line.images, text_only=not line.images)
            number = int(line.where.rpartition(":")[2])
            if (first := self.line_of.setdefault(line.id, number)) != number:
                self._warn("repeated id", f"{line.where}: id {line.id!r} is also on line {first}")
        self.num_lines += 1

    def _warn(self, kind: str, text: str) -> None:
        first, count = self.warnings.get(kind, (text, 0))
        self.warnings[kind] = (first, count + 1)

    def findings(self, images: Images, fingerprints: Mapping[str, int], checker: Checker) -> Findings:
        readable = {image: info for image, info in images.items() if isinstance(info, ImageInfo)}
        about = [f"{self.path}: {text}" for text in about_files(readable, checker.root, checker.rules)]
        found = self.warnings.values()
        bare, examples = self.counts["text_only"], counted(self.counts["examples"], "example")
        lost = [f"{self.path}: {bare:,} of {examples} without an image"] * (bare > 0)  # maybe lost on the way
        warnings = [text if n == 1 else f"{text} (and {counted(n - 1, 'more line')})" for text, n in found]
        tokens, answer_tokens, crops = (Statistics.of(numbers) if numbers else None for numbers in self.measures)
        return Findings(
            path=self.path,
            problems=tuple(self.problems if self.num_lines else [f"{self.path}: no examples"]),
            warnings=tuple(map(one_line, [*lost, *warnings, *about])),
            num_lines=self.num_lines,
            bad_lines=tuple(self.bad_lines),
            odd_lines=tuple(self.odd_lines),
            image_files=len(images),
            tokens=tokens if checker.processor else None,
            answer_tokens=answer_tokens if checker.processor else None,
            crops=crops,
            example_keys=self.keys.tobytes(),
            files=readable,
            fingerprints=fingerprints,
            **self.counts,
        )


def about_files(images: Mapping[str, ImageInfo], root: str, rules: ImageRules) -> Iterator[str]:
    """Warnings about what a viewer shows differently from what the model sees, each with the worst file."""
    turned, visible = rules.exif_orientation == "apply", rules.image_colors == "visible"
    for field, kind, seen in (
        ("orientation", "an EXIF orientation", turned or "it is ignored: --exif-orientation apply turns them"),
        ("animated", "several frames or pages", "the model sees the first"),
        ("clipped", "values outside 0..255", visible or "they are clipped: --image-colors visible scales them"),
        ("transparent", "transparency", visible or "it is dropped: --image-colors visible lays them on white"),
    ):
        found = sorted((-getattr(info, field), image) for image, info in images.items() if getattr(info, field))
        if found and isinstance(seen, str):
            share, worst = found[0]
            pixels = f", {-share:.2%} of its pixels" if isinstance(share, float) else ""
            files = f"{counted(len(found), 'image file')} with {kind} (such as {worst.removeprefix(root)}{pixels})"
            yield f"{files}: {seen}"


def overlap(questions: Findings, training: Findings) -> list[str]:
    """What a file to evaluate on shares with one to train on, as warnings."""
    asked, trained = (np.frombuffer(one.example_keys, np.uint64) for one in (questions, training))
    shared = int(np.isin(asked, trained).sum())
    found = [f"{shared:,} of {counted(len(asked), 'example')} are also in {training.path}"] if shared else []
    files = sorted(questions.files)
    kinds = twins([questions.files[file] for file in files], training.files.values())
    for kind, number in Counter(filter(None, kinds)).items():
        which = f"{number:,} of {counted(len(files), 'image file')} (such as {files[kinds.index(kind)]})"
        found.append(f"{which}: {training.path} shows {kind}")
    return [f"{questions.path}: {text}" for text in found]


def counted(number: int, noun: str) -> str:
    """1 line, 2,000 lines."""
    return f"{number:,} {noun}" + "s" * (number != 1)


# -- showing it --------------------------------------------------------------------------------------------------------


def render(findings: Findings, console: Console) -> None:
    """Print warnings and problems, one on each line, then counts, statistics and histograms, then the verdict."""
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
        number, bad = counted(len(findings.problems), "problem"), counted(len(findings.bad_lines), "line")
        console.print(Text(f"✗ {findings.path}: {number} on {bad}", style="bold red"))


def _histogram(name: str, histogram: Sequence[tuple[int, int]]) -> Table:
    table = Table(name, "", "examples", box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    table.columns[0].justify = table.columns[2].justify = "right"
    most = max(count for _, count in histogram)
    for low, count in histogram:
        table.add_row(f"{low:,}", Bar(most, 0, count, width=40, color="cyan"), f"{count:,}")
    return table
