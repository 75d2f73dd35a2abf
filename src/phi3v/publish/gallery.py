"""What models answered, for a page: which answers are confused, and the questions as a gallery."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.markup import escape

from phi3v.base.console import say
from phi3v.base.errors import InputError
from phi3v.base.jsonfile import Count, NonNegative
from phi3v.data.check import counted
from phi3v.data.encode import Example, questions
from phi3v.data.image import ImageRules
from phi3v.data.schema import read_jsonl
from phi3v.infer.metrics import Prediction, normalize_answer
from phi3v.publish.chart import number, percent
from phi3v.publish.html.images import Album, thumbnail
from phi3v.publish.html.page import Gallery, cut, without_tags
from phi3v.publish.results import Results

MAX_CLASSES = 15
WRONG_SHARE = 2 / 3  # of the questions that are shown, if not all are


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which questions a page shows, and how much of their images."""

    data: Path | None = None
    """The questions, if they have moved since: their earlier turns and images are read from there."""

    image_root: Path | None = None
    """Folder the image paths are relative to. Default: as when the run was trained."""

    limit: Count = 5000
    """Questions of each run in the page; wrong answers come first."""

    picture_mb: NonNegative = 8.0
    """Megabytes of images in the page."""

    picture_size: Count = 320
    """Pixels of the longer side of an image."""


# -- confusion -------------------------------------------------------------------------------------------------------


class Confusion(NamedTuple):
    """How often which answer was given: counts[i][j] questions with answer classes[i] were answered classes[j].

    The last column of `counts`, if it has one more than there are classes, is for all other answers.
    """

    classes: Sequence[str]
    counts: Sequence[Sequence[int]]
    note: str


def _classes(predictions: Sequence[Prediction]) -> list[str]:
    """All accepted answers, the most frequent first."""
    return [truth for truth, _ in Counter(_truth_and_answer(line)[0] for line in predictions).most_common()]


def _truth_and_answer(line: Prediction) -> tuple[str, str]:
    """Of several accepted answers the one that was given, else the first."""
    answer = normalize_answer(line["prediction"])
    accepted = [normalize_answer(text) for text in line["answers"]]
    return (answer if answer in accepted else accepted[0]), answer


def _cell(classes: Sequence[str], line: Prediction) -> tuple[int, int]:
    """The row and the column of the confusion matrix that a question counts in; len(classes) is any other answer."""
    truth, answer = (classes.index(text) if text in classes else len(classes) for text in _truth_and_answer(line))
    return truth, answer


def confusion(predictions: Sequence[Prediction]) -> Confusion | None:
    """The confusion matrix of the most frequent answers; None for free text, where these cover less than half."""
    every = _classes(predictions)
    classes = every[:MAX_CLASSES]
    cells = Counter(_cell(classes, line) for line in predictions)
    places = range(len(classes))
    counts = [[cells[truth, answer] for answer in (*places, len(classes))] for truth in places]
    covered = sum(map(sum, counts))
    if not covered or covered < len(predictions) / 2:
        return None
    if not any(row[-1] for row in counts):
        counts = [row[:-1] for row in counts]
    note = ""
    if len(every) > len(classes):
        share = percent(covered / len(predictions))
        note = f"These are the {len(classes)} most frequent of {len(every):,} answers, {share} of the questions."
    return Confusion(classes, counts, note)


# -- gallery ---------------------------------------------------------------------------------------------------------


def gallery(runs: Sequence[Results], options: Options, before: Mapping[str, Any]) -> Gallery | None:
    """The questions with their images and answers; None if there are none.

    What cannot be found any more is taken from the gallery `before`, as `gallery_in` reads it, and printed. Raises
    InputError when `options.data` or its image root cannot be read.
    """
    known = {entry["key"]: entry for entry in before.get("entries", ())}
    kept: dict[str, Any] = {}
    entries: list[dict[str, Any]] = []
    images: list[tuple[str, ...]] = []
    for place, (run, lines) in enumerate(zip(runs, _chosen(runs, options.limit), strict=True)):
        prompts = _prompts(run, lines, options)
        classes = _classes(run.predictions)[:MAX_CLASSES]
        for order, line in enumerate(lines):
            prompt = prompts.get(_key(line["where"], line["id"], line["user"]))
            entry = {**_entry(line, prompt), "order": order, "run": place, "cell": _cell(classes, line)}
            images.append(_images(line, prompt))
            if old := known.get(entry["key"]):
                entry["turns"] = entry["turns"] if prompt else old["turns"]
                numbers = zip(images[-1], old["images"], strict=False)
                kept |= {path: before["images"][n] for path, n in numbers if n >= 0 and not os.path.exists(path)}
            entries.append(entry)
    if not entries:
        return None
    seen = runs[0].settings.get("base") or {}
    rules = ImageRules(**{key: seen[key] for key in vars(ImageRules()) if seen.get(key)})
    album = Album(lambda path: kept.get(path) or thumbnail(path, options.picture_size, rules), options.picture_mb)
    wrong_first = sorted(range(len(entries)), key=lambda at: entries[at]["correct"])
    album.add(path for at in wrong_first for path in images[at])
    for entry, paths in zip(entries, images, strict=True):
        entry["images"] = album[paths]
    if gone := sorted({path for paths in images for path in paths if not os.path.exists(path)}):
        shown = sum(path in kept for path in gone)
        what = f"{counted(len(gone), 'image')} cannot be found, such as {gone[0]}; the page keeps {shown:,} of them"
        say(f"[yellow]note[/]    {escape(what)} (--data and --image-root say where they are now)")
    return Gallery(
        entries=entries,
        images=album.images,
        groups=[("", "All"), ("wrong", "Wrong"), ("right", "Right")],
        sorts=[
            ("Wrong first", "correct", 1),
            ("Lowest score first", "score", 1),
            ("Longest answer first", "length", -1),
            ("As in the file", "order", 1),
        ],
        runs=[run.name for run in runs],
        note=_note(runs, entries, options.picture_mb),
    )


def _chosen(runs: Sequence[Results], limit: int) -> list[list[Prediction]]:
    """The lines of every run that are shown: of runs that answered the same questions, the same ones."""
    asked = [[(line["id"], line["user"], line["images"]) for line in run.predictions] for run in runs]
    correct = [[line["correct"] for line in run.predictions] for run in runs]
    if all(one == asked[0] for one in asked):
        correct = [list(map(all, zip(*correct, strict=True)))] * len(runs)
    return [[run.predictions[at] for at in choose(one, limit)] for run, one in zip(runs, correct, strict=True)]


def choose(correct: Sequence[bool], limit: int) -> list[int]:
    """The places of at most `limit` questions, ascending: up to WRONG_SHARE wrong ones, then right ones.

    The choice is random, but always the same for the same answers.
    """
    mixed = random.Random(0).sample(range(len(correct)), len(correct))
    wrong = [at for at in mixed if not correct[at]]
    right = [at for at in mixed if correct[at]]
    num_wrong = max(int(limit * WRONG_SHARE), limit - len(right))
    return sorted((wrong[:num_wrong] + right)[:limit])


def _key(where: str, identifier: str, user: str) -> str:
    """The same for a question in all runs: its line in the data, its id, and its text."""
    return f"{where.rpartition(':')[2]} {identifier} {user}"


def _prompts(run: Results, lines: Sequence[Prediction], options: Options) -> dict[str, Example]:
    """The questions as the data file has them, by `_key`: with the turns before them, and the images as the image root
    has them now. There are none if the file has moved or changed since.
    """
    file = options.data or (lines[0]["where"].rpartition(":")[0] if lines else "")
    if not options.data and not os.path.isfile(file):
        if file:
            say(f"[yellow]note[/]    {escape(str(file))} cannot be found: earlier turns may be missing (--data)")
        return {}
    root = options.image_root or (run.settings.get("data") or {}).get("image_root")
    try:
        examples = read_jsonl(file, root if root and os.path.isdir(root) else options.image_root)
    except InputError:
        if options.data or options.image_root:
            raise
        return {}
    prompts = [prompt for example in examples for prompt in questions(example)]
    return {_key(prompt.where, prompt.id, prompt.turns[-1].user): prompt for prompt in prompts}


def _images(line: Prediction, prompt: Example | None) -> tuple[str, ...]:
    """The paths of the images of a question: where they were, else where the data file has them now."""
    now = prompt.images if prompt is not None and len(prompt.images) == len(line["images"]) else line["images"]
    return tuple(was if os.path.exists(was) else is_now for was, is_now in zip(line["images"], now, strict=True))


def _entry(line: Prediction, prompt: Example | None) -> dict[str, Any]:
    """An entry of the gallery."""
    correct, score, answer = line["correct"], line["anls"], line["prediction"].strip()
    asked = without_tags(line["user"])
    turns: list[tuple[str, str | None, int]] = [(asked, None, len(line["images"]))]
    if prompt is not None:
        turns = [(without_tags(turn.user), turn.assistant, len(turn.images)) for turn in prompt.turns]
    mark = "\N{CHECK MARK}" if correct else "\N{BALLOT X}"
    likeliest = sorted(line.get("label_log_probs", {}).items(), key=lambda pair: -pair[1])
    details = {
        "score": f"{'right' if correct else 'wrong'}, ANLS {percent(score)}",
        "answer length": counted(line["num_tokens"], "token") if line["num_tokens"] else "",
        "id": line["id"],
        "source": line["source"],
        "where": line["where"],
        "group": line.get("group", ""),
        "log-probabilities": ", ".join(f"{label} {number(value)}" for label, value in likeliest[:10]),
    }
    return {
        "group": "right" if correct else "wrong",
        "asked": cut(asked),
        "rows": [
            ("answer", cut(" / ".join(dict.fromkeys(line["answers"]))), ""),
            ("model", f"{cut(answer) or '(nothing)'} {mark}", "good" if correct else "bad"),
        ],
        "foot": line["id"] + (f" · ANLS {percent(score)}" if not correct and score > 0 else ""),
        "turns": [(cut(user), None if said is None else cut(said), count) for user, said, count in turns],
        "details": [(name, cut(text)) for name, text in details.items() if text],
        "key": _key(line["where"], line["id"], line["user"]),
        "correct": int(correct),
        "score": score,
        "length": len(answer),
    }


def _note(runs: Sequence[Results], entries: Sequence[Mapping[str, Any]], megabytes: float) -> str:
    every = [line["correct"] for run in runs for line in run.predictions]
    wrong = every.count(False)
    note = f"All {len(every):,} questions, {wrong:,} of them answered wrongly. "
    if len(entries) < len(every):
        shown = sum(entry["group"] == "wrong" for entry in entries)
        note = f"{len(entries):,} of {len(every):,} questions, {shown:,} of the {wrong:,} wrong ones "
        note += "(--limit shows more). "
    if bare := sum(-1 in entry["images"] for entry in entries):
        note += f"{bare:,} lack images, which would take more than {megabytes:g} MB (--picture-mb). "
    return note
