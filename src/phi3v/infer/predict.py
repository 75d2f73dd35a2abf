"""`phi3v predict`: answers to a file of questions, as a file, for work that may outlive a process.

Invariant: however often it is killed, wherever, and started again, FILE ends with one line for every question, in the
order of the data. Until then its lines come page by page, all of them whole but possibly the last. FILE.settings.json
beside it holds what they were made with, so that lines made otherwise are never added.

Under `torchrun` every process answers its share, and the first one writes. The questions wait on disk: memory holds a
few numbers for each of them.
"""

from __future__ import annotations

import functools
import json
import os
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from rich.markup import escape
from tyro.conf import arg

from phi3v.base.config import check_flags
from phi3v.base.console import progress_bar, say
from phi3v.base.errors import InputError
from phi3v.base.files import disk_errors, file_digest, flush, locked, make_folder, write_text
from phi3v.base.jsonfile import Count, read_object
from phi3v.base.ranks import Ranks, join
from phi3v.base.runfolder import model_digest
from phi3v.data.encode import Example, encode, questions
from phi3v.data.image import load_image
from phi3v.data.processor import Phi3VProcessor
from phi3v.data.schema import NAMES_KEPT, iter_jsonl
from phi3v.infer.answering import Answerer, Loading, Packing, Scoring, evenly, model_folder
from phi3v.infer.labels import label_tokens
from phi3v.infer.metrics import Prediction
from phi3v.packing.ondisk import OnDisk
from phi3v.packing.trees import Ints

QUESTIONS_AT_ONCE = 100
"""Answers are written after about as many questions of each process, whole pages of them; a kill loses no more."""


def predict(
    model: str,
    data: Path,
    /,
    *,
    out: Path,
    image_root: Path | None = None,
    limit: Count | None = None,
    max_new_tokens: Count = 64,
    labels: tuple[str, ...] = (),
    on_bad_example: Literal["stop", "skip"] = "stop",
    loading: Annotated[Loading, arg(name="")] = Loading(),
    packing: Annotated[Packing, arg(name="")] = Packing(),
    progress: bool = True,
) -> Path:
    """Answer every question of a file. Killed? The same command continues.

    The last turn of a conversation needs no answer: then it is the question, after the turns before it. Otherwise every
    turn is one. A line of FILE has the id, the line of the data, the question and the prediction.

    Args:
        model: A run folder (its final model), or a model or adapter folder, or a name on the Hub.
        data: Conversations, one JSON object a line.
        out: The file of the answers.
        image_root: Folder the image paths are relative to. Default: the folder `images` beside the data file.
        limit: Answer only this many questions, evenly spread.
        max_new_tokens: Longest answer, in tokens.
        labels: A closed set: the prediction is the most likely label, and the log-probabilities of all are written.
        on_bad_example: When an image or a text cannot be used. stop: end, naming it. skip: its line has an `error`.
        progress: Show a progress bar.
    """
    check_flags(locals(), predict)
    if out.is_dir():
        raise InputError(f"--out {out} is a folder: name a file")
    ranks = join()
    asked = ranks.all_do(lambda: Asked(data, image_root, limit))
    processor = Phi3VProcessor.from_pretrained(model_folder(model), **loading.seeing)
    if labels:
        label_tokens(labels, processor)  # raises InputError before the model is loaded
    made_with = {
        "MODEL": model_digest(folder) if (folder := Path(model_folder(model))).is_dir() else model,
        "DATA": asked.digest,
        "--image-root": None if image_root is None else str(image_root),
        "--limit": limit,
        **{f"--{name.replace('_', '-')}": value for name, value in loading.seeing.items()},
        "--max-new-tokens": max_new_tokens,
        "--labels": list(labels),
        "--dtype": loading.dtype,
    }
    skip, scoring = on_bad_example == "skip", Scoring("labels", labels) if labels else Scoring()
    file, num_asked = AnswerFile(out, made_with, asked), len(asked.order)
    sizes = functools.lru_cache(NAMES_KEPT)(processor.read_size)  # a page has many questions
    decodes = functools.lru_cache(NAMES_KEPT)(lambda image: load_image(image) is not None)

    def fault(prompt: Example) -> str | None:
        try:
            encode(prompt, processor, sizes)
            all(map(decodes, prompt.images))
        except InputError as error:
            return str(error).removeprefix(f"{prompt.where}: ")
        return None

    with ExitStack() as held:
        num_done = ranks.first_does(lambda: file.open(held))
        if num_done:
            say(f"{num_done:,} of {num_asked:,} questions are answered already")
        if len(left := asked.order[num_done:]):
            if not skip:
                ranks.all_do(lambda: [encode(asked[n], processor, sizes).tokens for n in left[ranks.rank :: ranks.num]])
            answerer = Answerer.load(model, loading, packing, ranks)
            with progress_bar("answering", num_asked, "questions", show=progress, summary=False) as advance:
                advance(num_done)
                for numbers in portions(left, asked.page, QUESTIONS_AT_ONCE * ranks.num):
                    prompts = [asked[number] for number in numbers]
                    faults = _shared(fault, prompts, ranks) if skip else [None] * len(prompts)
                    good = [prompt for prompt, error in zip(prompts, faults, strict=True) if error is None]
                    answered = iter(answerer.answers(good, scoring, max_new_tokens=max_new_tokens, progress=False))
                    lines = [
                        _line(prompt, next(answered)) if error is None else {**_about(prompt), "error": error}
                        for prompt, error in zip(prompts, faults, strict=True)
                    ]
                    ranks.first_does(functools.partial(file.add, lines))
                    advance(len(lines))
        num_failed = ranks.first_does(file.finish)
    if num_failed:
        say(f"[yellow]note[/]  {num_failed:,} of {num_asked:,} lines have an error instead of a prediction")
    say(f"{num_asked:,} answers in {escape(str(out))}")
    return out


# -- questions -------------------------------------------------------------------------------------------------------


class Asked:
    """The questions of a data file by number, kept on disk, and the order they are answered in: page by page.

    With `limit`, that many of them, evenly spread. Raises InputError for what is no example.
    """

    def __init__(self, data: Path, image_root: Path | None, limit: int | None) -> None:
        self._prompts, pages, keys = OnDisk[Example](), array("q"), array("q")
        for example in iter_jsonl(data, image_root, prompts=True):
            for prompt in [example] if example.turns[-1].assistant is None else questions(example):
                pages.append(hash(prompt.images) if prompt.images else len(pages))  # a text is a page of its own
                keys.append(_key(_about(prompt)))
                self._prompts.extend([prompt])
        self.digest = file_digest(data)
        self.key: Ints = np.array(keys)
        _, first, page = np.unique(np.array(pages), return_index=True, return_inverse=True)
        self.page: Ints = first[page]
        chosen = np.array(evenly(range(len(keys)), limit))
        self.order: Ints = chosen[np.argsort(self.page[chosen], kind="stable")]

    def __getitem__(self, number: int) -> Example:
        return self._prompts[number]


def portions(order: Ints, page: Ints, size: int) -> Iterator[Ints]:
    """The questions in order, in portions of at least `size`; a page is never divided."""
    start = 0
    for end in (np.flatnonzero(np.diff(page[order], append=-1)) + 1).tolist():
        if end - start >= size or end == len(order):
            yield order[start:end]
            start = end


def _shared(work: Callable[[Example], str | None], prompts: Sequence[Example], ranks: Ranks) -> list[str | None]:
    """`work` on every prompt, of which every rank does its share."""
    found: list[str | None] = [None] * len(prompts)
    for rank, mine in enumerate(ranks.gather([work(prompt) for prompt in prompts[ranks.rank :: ranks.num]])):
        found[rank :: ranks.num] = mine
    return found


# -- answers ---------------------------------------------------------------------------------------------------------


def _about(prompt: Example) -> dict[str, Any]:
    line = int(prompt.where.rpartition(":")[2])
    return {"id": prompt.id, "line": line, "question": prompt.turns[-1].user}


def _key(line: Mapping[str, Any]) -> int:
    """A number for a question: by its line in the data and its id, as the turns of a line have different ones."""
    return zlib.crc32(f"{line.get('line')} {line.get('id')}".encode())


def _line(prompt: Example, prediction: Prediction) -> dict[str, Any]:
    scores = {"label_log_probs": prediction["label_log_probs"]} if "label_log_probs" in prediction else {}
    return {**_about(prompt), "prediction": prediction["prediction"], **scores}


class AnswerFile:
    """FILE and its settings. One process at a time may have one."""

    def __init__(self, path: Path, made_with: Mapping[str, Any], asked: Asked) -> None:
        self.path, self.settings = path, path.with_name(f"{path.name}.settings.json")
        self._made_with, self._asked = made_with, asked
        self._keys, self._ends, self._num_failed = array("q"), array("q", [0]), 0
        """Of every line the key and where it ends; how many have an error."""

    def open(self, held: ExitStack) -> int:
        """Lock the file as long as `held` lasts; return the number of questions that it has answers to."""
        make_folder(self.path.parent)
        lock = self.path.with_name(f".{self.path.name}.lock")
        held.enter_context(locked(lock, f"--out {self.path}: another process is writing it"))
        if self.path.exists() and self.path.stat().st_size:
            self._check_settings()
            self._read()
        return len(self._keys)

    def _check_settings(self) -> None:
        if not self.settings.is_file():
            raise InputError(f"--out {self.path} exists, and not from `phi3v predict`: choose another file")
        before = read_object(self.settings)
        for name, value in self._made_with.items():
            if before.get(name) != value:
                changed = f"the {name.lower()} has changed since"
                what = changed if name in ("DATA", "MODEL") else f"{name} was {before.get(name)}, now {value}"
                raise InputError(f"--out {self.path} was begun otherwise: {what}; choose another file, or remove it")

    def _read(self) -> None:
        """Take note of the lines: page by page or, once finished, in the order of the data. Drop half a line."""
        with open(self.path, "rb") as stream:
            for number, raw in enumerate(stream, start=1):
                if not raw.endswith(b"\n"):  # the process was killed
                    break
                try:
                    self._note(json.loads(raw), len(raw))
                except (ValueError, AttributeError) as error:
                    raise InputError(f"{self.path}:{number}: not JSON: {error}") from error
        found, order, key = np.array(self._keys), self._asked.order, self._asked.key
        if not self._is_finished(found):
            same = np.append(found[: len(order)] == key[order][: len(found)], len(found) <= len(order))
            if not same.all():
                raise InputError(f"{self.path}:{np.argmin(same) + 1}: this line is not from here: choose another file")
        os.truncate(self.path, self._ends[-1])

    def _is_finished(self, found: Ints) -> bool:
        return np.array_equal(found, self._asked.key[np.sort(self._asked.order)])

    def _note(self, line: Mapping[str, Any], size: int) -> None:
        self._keys.append(_key(line))
        self._ends.append(self._ends[-1] + size)
        self._num_failed += "error" in line

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        """Append lines; when this returns they are on disk."""
        if not self._keys:
            write_text(self.settings, json.dumps(self._made_with, indent=1))
        with disk_errors(self.path), open(self.path, "ab") as stream:
            for line in lines:
                raw = json.dumps(line, ensure_ascii=False).encode() + b"\n"
                stream.write(raw)
                self._note(line, len(raw))
            stream.flush()
            os.fsync(stream.fileno())

    def finish(self) -> int:
        """Put the lines into the order of the data; return how many have an error instead of a prediction."""
        if not self._is_finished(np.array(self._keys)):
            temporary = self.path.with_name(f".{self.path.name}.unfinished")
            with disk_errors(self.path), open(self.path, "rb") as source, open(temporary, "wb") as target:
                for place in np.argsort(self._asked.order):
                    source.seek(self._ends[place])
                    target.write(source.readline())
            with disk_errors(self.path):
                flush(temporary)
                os.replace(temporary, self.path)
        return self._num_failed
