"""`phi3v predict`: answers to a file of questions, as a file, for work that may outlive a process.

Invariant: however often it is killed, wherever, and started again, FILE ends with one line for every question, in the
order of the data. Until then its lines come page by page, all of them whole but possibly the last. FILE.settings.json
beside it holds what they were made with, so that lines made otherwise are never added.
"""

from __future__ import annotations

import functools
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.markup import escape
from tyro.conf import arg

from phi3v.base.config import check_flags
from phi3v.base.console import progress_bar, say
from phi3v.base.errors import InputError
from phi3v.base.files import disk_errors, file_digest, locked, make_folder, write_text
from phi3v.base.jsonfile import Count, read_object
from phi3v.base.runfolder import model_digest, read_lines
from phi3v.data.encode import Example, encode, questions
from phi3v.data.image import load_image
from phi3v.data.processor import Phi3VProcessor
from phi3v.data.schema import read_jsonl
from phi3v.infer.answering import Answerer, Loading, Packing, Scoring, evenly, model_folder
from phi3v.infer.labels import label_tokens
from phi3v.infer.metrics import Prediction

QUESTIONS_AT_ONCE = 100
"""Answers are written after about as many questions, whole pages of them; a kill loses no more."""

Key = tuple[int, str]
"""A question: the number of its line in the data, and its id (the turns of a line have different ones)."""


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
    found = [
        question
        for example in read_jsonl(data, image_root, prompts=True)
        for question in ([example] if example.turns[-1].assistant is None else questions(example))
    ]
    prompts = {_key(prompt): prompt for prompt in evenly(found, limit)}
    processor = Phi3VProcessor.from_pretrained(model_folder(model), **loading.seeing)
    if labels:
        label_tokens(labels, processor)  # raises InputError before the model is loaded
    made_with = {
        "MODEL": model_digest(folder) if (folder := Path(model_folder(model))).is_dir() else model,
        "DATA": file_digest(data),
        "--image-root": None if image_root is None else str(image_root),
        "--limit": limit,
        **{f"--{name.replace('_', '-')}": value for name, value in loading.seeing.items()},
        "--max-new-tokens": max_new_tokens,
        "--labels": list(labels),
        "--dtype": loading.dtype,
    }
    skip, scoring = on_bad_example == "skip", Scoring("labels", labels) if labels else Scoring()
    sizes = functools.cache(processor.read_size)  # a page has many questions
    decodes = functools.cache(lambda image: load_image(image) is not None)
    make_folder(out.parent)
    with locked(out.with_name(f".{out.name}.lock"), f"--out {out}: another process is writing it"):
        file = AnswerFile(out, made_with, prompts)
        if file.done:
            say(f"{len(file.done):,} of {len(prompts):,} questions are answered already")
        if left := [prompt for key, prompt in prompts.items() if key not in file.done]:
            good, bad = _split(left, lambda prompt: encode(prompt, processor, sizes), skip=skip)
            if bad:
                file.add(bad)
            answerer = Answerer.load(model, loading, packing)
            with progress_bar("answering", len(prompts), "questions", show=progress, summary=False) as advance:
                advance(len(file.done))
                for portion in _portions(good):
                    asked, bad = portion, []
                    if skip:
                        asked, bad = _split(portion, lambda prompt: all(map(decodes, prompt.images)), skip=True)
                    answered = answerer.answers(asked, scoring, max_new_tokens=max_new_tokens, progress=False)
                    file.add([*bad, *map(_line, asked, answered)])
                    advance(len(portion))
        file.finish()
    if num_failed := sum("error" in line for line in file.done.values()):
        say(f"[yellow]note[/]  {num_failed:,} of {len(prompts):,} lines have an error instead of a prediction")
    say(f"{len(prompts):,} answers in {escape(str(out))}")
    return out


# -- questions -------------------------------------------------------------------------------------------------------


def _key(prompt: Example) -> Key:
    return int(prompt.where.rpartition(":")[2]), prompt.id


def _split(
    prompts: Sequence[Example], check: Callable[[Example], Any], *, skip: bool
) -> tuple[list[Example], list[dict[str, Any]]]:
    """The questions that pass `check`, and with `skip` the lines of the others; without, the first is raised."""
    good, bad = [], []
    for prompt in prompts:
        try:
            check(prompt)
            good.append(prompt)
        except InputError as error:
            if not skip:
                raise
            bad.append({**_about(prompt), "error": str(error).removeprefix(f"{prompt.where}: ")})
    return good, bad


def _portions(prompts: Sequence[Example]) -> Iterator[list[Example]]:
    """The questions page by page, in portions of at least QUESTIONS_AT_ONCE; a page is never divided."""
    pages = defaultdict[Any, list[Example]](list)
    for prompt in prompts:
        pages[prompt.images or _key(prompt)].append(prompt)
    portion = list[Example]()
    for page in pages.values():
        portion += page
        if len(portion) >= QUESTIONS_AT_ONCE:
            yield portion
            portion = []
    if portion:
        yield portion


# -- answers ---------------------------------------------------------------------------------------------------------


def _about(prompt: Example) -> dict[str, Any]:
    return {"id": prompt.id, "line": _key(prompt)[0], "question": prompt.turns[-1].user}


def _line(prompt: Example, prediction: Prediction) -> dict[str, Any]:
    scores = {"label_log_probs": prediction["label_log_probs"]} if "label_log_probs" in prediction else {}
    return {**_about(prompt), "prediction": prediction["prediction"], **scores}


class AnswerFile:
    """FILE and its settings. One process at a time may have one."""

    def __init__(self, path: Path, made_with: Mapping[str, Any], keys: Mapping[Key, Any]) -> None:
        self.path, self.settings = path, path.with_name(f"{path.name}.settings.json")
        self._made_with, self._keys = made_with, keys
        self.done: dict[Key, dict[str, Any]] = {}
        """The lines that are there, by question."""
        if path.exists() and path.stat().st_size:
            self._check_settings()
            self._read()

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
        for number, line in enumerate(read_lines(self.path), start=1):
            key: Any = (line.get("line"), line.get("id"))
            if key not in self._keys or key in self.done:
                raise InputError(f"{self.path}:{number}: this line is not from here: choose another file")
            self.done[key] = line
        os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)  # half a line, where a process was killed

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        """Append lines; when this returns they are on disk."""
        if not self.done:
            write_text(self.settings, json.dumps(self._made_with, indent=1))
        with disk_errors(self.path), open(self.path, "a", encoding="utf-8") as stream:
            stream.write(_text(lines))
            stream.flush()
            os.fsync(stream.fileno())
        self.done |= {(line["line"], line["id"]): line for line in lines}

    def finish(self) -> None:
        """Put the lines into the order of the data."""
        write_text(self.path, _text([self.done[key] for key in self._keys]))


def _text(lines: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
