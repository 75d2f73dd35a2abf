"""Answers to a file of questions, as a file: for work that is longer than a process lives.

Invariant: however often it is killed, wherever, and begun again, FILE ends with one line for every question, in the
order of the data. Until then its lines come page by page, whole but for the last; FILE.settings.json beside it says
what they were made with, so that no others are ever added to them.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from rich.markup import escape

from phi3v.base.config import Attention, Precision, check_flags
from phi3v.base.console import SECONDS_BETWEEN_LINES, console, progress_bar, say
from phi3v.base.errors import InputError
from phi3v.base.files import disk_errors, make_folder, write_text
from phi3v.base.jsonfile import Count, NonNegativeInt, parse_object, read_object
from phi3v.data.encode import Encoded, Example, encode, questions
from phi3v.data.image import load_image, read_size
from phi3v.data.processor import Phi3VProcessor
from phi3v.data.schema import read_jsonl
from phi3v.infer.evaluate import Answering, Scoring, evenly, model_folder
from phi3v.infer.evaluate import predict as answers_of
from phi3v.infer.labels import label_tokens
from phi3v.packing.trees import Lengths, PackLimits

PACKS_AT_ONCE = 4
"""What is answered between two writes: about as much as fills so many packs. A kill loses no more."""

Key = tuple[int, str]
"""A question: the number of its line in the data, and its id (of several turns on a line each has its own)."""


def predict(
    model: str,
    data: Path,
    /,
    *,
    out: Path,
    image_root: Path | None = None,
    limit: Count | None = None,
    num_crops: Count | None = None,
    max_new_tokens: Count = 64,
    labels: tuple[str, ...] = (),
    on_bad_example: Literal["stop", "skip"] = "stop",
    max_tokens_per_pack: Count | None = None,
    max_crops_per_pack: Count = 64,
    dtype: Precision = "auto",
    attention: Attention = "auto",
    num_workers: NonNegativeInt = 0,
    progress: bool = True,
) -> Path:
    """Answer every question of a file. Killed? The same command goes on.

    The last turn of a conversation needs no answer: then it is the question, after the turns before it. Otherwise every
    turn is one. A line of FILE has the id, the line of the data, the question and the prediction.

    Args:
        model: A run folder (its final model), or a model or adapter folder, or a name on the Hub.
        data: Conversations, one JSON object a line.
        out: The file of the answers.
        image_root: Folder the image paths are relative to. Default: the folder `images` beside the data file.
        limit: Answer only this many questions, evenly spread.
        num_crops: Tiles an image may be cut into. Default: the checkpoint's own.
        max_new_tokens: Longest answer, in tokens.
        labels: A closed set: the prediction is the most likely of these, and the log-probabilities of all stand beside.
        on_bad_example: When an image or a text cannot be used. stop: end, naming it. skip: its line says the `error`.
        max_tokens_per_pack: Tokens of one forward pass. Default: 8192 on a GPU, 4096 on a CPU.
        max_crops_per_pack: 336x336 crops of one forward pass.
        dtype: Precision of the arithmetic.
        attention: How attention is computed. All choices compute the same.
        num_workers: Processes that read images.
        progress: Show a progress bar.
    """
    check_flags(locals(), predict)
    found = [question for example in read_jsonl(data, image_root, prompts=True) for question in _asked(example)]
    prompts = {_key(prompt): prompt for prompt in evenly(found, limit)}
    folder, skip = model_folder(model), on_bad_example == "skip"
    made_with = {
        "MODEL": model,
        "DATA": hashlib.sha256(data.read_bytes()).hexdigest(),
        "--image-root": None if image_root is None else str(image_root),
        "--limit": limit,
        "--num-crops": num_crops,
        "--max-new-tokens": max_new_tokens,
        "--labels": list(labels),
        "--dtype": dtype,
    }
    with AnswerFile(out, made_with, prompts) as file:
        if file.done:
            say(f"{len(file.done):,} of {len(prompts):,} questions are answered already")
        if file.left:
            processor = Phi3VProcessor.from_pretrained(folder, num_crops=num_crops)
            if labels:
                label_tokens(labels, processor)  # it refuses some, and the model takes its time
            good, bad = _encoded([prompts[key] for key in file.left], processor, skip=skip)
            file.add(bad)
            answering = Answering.of(
                folder,
                num_crops=num_crops,
                dtype=dtype,
                attention=attention,
                num_workers=num_workers,
                max_tokens_per_pack=max_tokens_per_pack,
                max_crops_per_pack=max_crops_per_pack,
            )
            scoring = Scoring("labels", labels) if labels else Scoring()
            with _progress(len(file.done), len(prompts), show=progress) as advance:
                for portion in _portions(good, answering.limits):
                    file.add(_answers(answering, portion, scoring, max_new_tokens, skip=skip))
                    advance(len(portion))
        num_failed = file.finish()
    if num_failed:
        say(f"[yellow]note[/]  {num_failed:,} of {len(prompts):,} lines have an error instead of a prediction")
    say(f"{len(prompts):,} answers in {escape(str(out))}")
    return out


@contextmanager
def _progress(done: int, total: int, *, show: bool) -> Iterator[Callable[[int], None]]:
    """A bar that may start in the middle; without a terminal, a line now and then."""
    told = time.monotonic()

    def move(count: int) -> None:
        nonlocal done, told
        done += count
        advance(count)
        if show and not console.is_terminal and time.monotonic() - told > SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            say(f"{done:,} of {total:,} questions")

    with progress_bar("answering", total, "questions", show=show, summary=False) as advance:
        advance(done)
        yield move


# -- questions -------------------------------------------------------------------------------------------------------


def _asked(example: Example) -> list[Example]:
    return [example] if example.turns[-1].assistant is None else questions(example)


def _key(prompt: Example) -> Key:
    return int(prompt.where.rpartition(":")[2]), prompt.id


def _encoded(
    prompts: Sequence[Example], processor: Phi3VProcessor, *, skip: bool
) -> tuple[list[tuple[Example, Encoded]], list[dict[str, Any]]]:
    """The questions that can be asked, and the lines of those that cannot, or the first of these as an InputError."""
    sizes = functools.cache(read_size)
    good, bad = [], []
    for prompt in prompts:
        try:
            good.append((prompt, encode(prompt, processor, sizes)))
        except InputError as error:
            if not skip:
                raise
            bad.append(_failed(prompt, error))
    return good, bad


def _portions(asked: Sequence[tuple[Example, Encoded]], limits: PackLimits) -> Iterator[list[Example]]:
    """The questions page by page, as many at once as fill PACKS_AT_ONCE packs; a page is never divided."""
    lengths = Lengths.of([encoded for _, encoded in asked])
    portion, load, page = list[Example](), 0.0, -1
    for index in np.argsort(lengths.page, kind="stable").tolist():
        tokens, crops = int(lengths.tokens[index] - lengths.prefix[index]), 0
        if lengths.page[index] != page:
            if load >= PACKS_AT_ONCE:
                yield portion
                portion, load = [], 0.0
            page = lengths.page[index]
            tokens, crops = int(lengths.tokens[index]), int(lengths.crops[index])
        portion.append(asked[index][0])
        load += max(tokens / limits.max_tokens_per_pack, crops / limits.max_crops_per_pack)
    if portion:
        yield portion


# -- answers ---------------------------------------------------------------------------------------------------------


def _answers(
    answering: Answering, prompts: Sequence[Example], scoring: Scoring, max_new_tokens: int, *, skip: bool
) -> list[dict[str, Any]]:
    """A line for every question. With `skip`, what is wrong with an image becomes the line of its questions."""
    if not prompts:
        return []
    try:
        predictions = answers_of(
            answering.model,
            answering.processor,
            prompts,
            scoring,
            max_new_tokens=max_new_tokens,
            progress=False,
            **answering.how,
        )
    except InputError:
        failed = _unreadable(prompts) if skip else {}
        if not failed:
            raise
        left = [prompt for prompt in prompts if _key(prompt) not in failed]
        return [*failed.values(), *_answers(answering, left, scoring, max_new_tokens, skip=skip)]
    return [
        {
            **_about(prompt),
            "prediction": prediction["prediction"],
            **({"label_log_probs": prediction["label_log_probs"]} if scoring.labels else {}),
        }
        for prompt, prediction in zip(prompts, predictions, strict=True)
    ]


def _unreadable(prompts: Sequence[Example]) -> dict[Key, dict[str, Any]]:
    """The lines of the questions with an image that has a header, but no picture after it."""

    @functools.cache
    def reason(image: str) -> InputError | None:
        try:
            load_image(image)
        except InputError as error:
            return error
        return None

    found = {}
    for prompt in prompts:
        if error := next(filter(None, map(reason, prompt.images)), None):
            found[_key(prompt)] = _failed(prompt, error)
    return found


def _about(prompt: Example) -> dict[str, Any]:
    return {"id": prompt.id, "line": _key(prompt)[0], "question": prompt.turns[-1].user}


def _failed(prompt: Example, error: InputError) -> dict[str, Any]:
    return {**_about(prompt), "error": str(error).removeprefix(f"{prompt.where}: ")}


class AnswerFile:
    """FILE, open for one process, with the lines it has. A context manager; FILE stays only if it has any."""

    def __init__(self, path: Path, made_with: Mapping[str, Any], keys: Mapping[Key, Any]) -> None:
        self.path, self.settings = path, path.with_name(f"{path.name}.settings.json")
        self._made_with, self._keys = made_with, keys
        self.done: dict[Key, dict[str, Any]] = {}

    @property
    def left(self) -> list[Key]:
        """The questions without a line, in the order of the data."""
        return [key for key in self._keys if key not in self.done]

    def __enter__(self) -> Self:
        make_folder(self.path.parent)
        try:
            self._stream = open(self.path, "a+b")  # closed by __exit__
        except OSError as error:
            raise InputError(f"--out {self.path}: {error.strerror}") from error
        try:
            fcntl.lockf(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock's would live on in data workers
        except OSError as error:
            self._stream.close()
            raise InputError(f"--out {self.path}: another process is writing it") from error
        try:
            if os.fstat(self._stream.fileno()).st_size:
                self._check_settings()
                self._read()
            else:
                write_text(self.settings, json.dumps(self._made_with, indent=1))
        except BaseException:
            self.__exit__()
            raise
        return self

    def _check_settings(self) -> None:
        if not self.settings.is_file():
            raise InputError(f"--out {self.path} exists, and not from `phi3v predict`: choose another file")
        before = read_object(self.settings)
        for name, value in self._made_with.items():
            if before.get(name) != value:
                what = "the data has changed since" if name == "DATA" else f"{name} was {before.get(name)}, now {value}"
                raise InputError(f"--out {self.path} was begun otherwise: {what}; choose another file, or remove it")

    def _read(self) -> None:
        """What is there, without the half line of a process that was killed as it wrote."""
        self._stream.seek(0)
        content = self._stream.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._stream.truncate(len(whole))
        for number, text in enumerate(whole.split(b"\n")[:-1], start=1):
            line = parse_object(text, f"{self.path}:{number}")
            key: Any = (line.get("line"), line.get("id"))
            if key not in self._keys or key in self.done:
                raise InputError(f"{self.path}:{number}: no line that was written here: choose another file")
            self.done[key] = line

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        """Appends lines; afterwards they are on disk."""
        with disk_errors(self.path):
            self._stream.write(b"".join(map(_bytes, lines)))
            self._stream.flush()
            os.fsync(self._stream.fileno())
        self.done |= {(line["line"], line["id"]): line for line in lines}

    def finish(self) -> int:
        """Puts the lines into the order of the data. Returns how many are errors."""
        ordered = [self.done[key] for key in self._keys]
        write_text(self.path, b"".join(map(_bytes, ordered)).decode())
        return sum("error" in line for line in ordered)

    def __exit__(self, *unused: object) -> None:
        if os.fstat(self._stream.fileno()).st_size == 0:
            for file in (self.path, self.settings):
                file.unlink(missing_ok=True)
        self._stream.close()


def _bytes(line: Mapping[str, Any]) -> bytes:
    return (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "replace")  # half a character, for one
