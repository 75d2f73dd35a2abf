"""What models answered, for a page: which answers are confused, and the questions as a gallery."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from phi3v.base.errors import InputError
from phi3v.data.check import counted
from phi3v.data.encode import Example, questions
from phi3v.data.schema import read_jsonl
from phi3v.infer.metrics import Prediction, normalize_answer
from phi3v.publish.chart import number, percent
from phi3v.publish.html.images import Album, thumbnail
from phi3v.publish.html.page import Gallery, cut, without_tags

MAX_CLASSES = 15
WRONG_SHARE = 2 / 3  # of the questions that are shown, if not all are


class Answers(NamedTuple):
    """The predictions of one run, and the data file and image root that its settings name."""

    run: str
    predictions: Sequence[Prediction]
    data: Path | None
    image_root: Path | None


# -- confusion -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cell:
    count: int
    share: float
    kind: str  # "right", "wrong" or "none"
    title: str
    key: str
    """The `cell` of the gallery's entries that are counted here."""


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """Rows are accepted answers, columns the model's; the last column counts all its other answers."""

    columns: list[str]
    rows: list[tuple[str, list[Cell], float]]
    note: str


def _truth_and_answer(line: Prediction) -> tuple[str, str]:
    """Of several accepted answers the one that was given, else the first."""
    answer = normalize_answer(line["prediction"])
    accepted = [normalize_answer(text) for text in line["answers"]]
    return (answer if answer in accepted else accepted[0]), answer


def _classes(predictions: Sequence[Prediction]) -> list[str]:
    """The most frequent accepted answers."""
    return [truth for truth, _ in Counter(_truth_and_answer(line)[0] for line in predictions).most_common(MAX_CLASSES)]


def _cell_key(classes: Sequence[str], truth: str, answer: str | None) -> str:
    places = [classes.index(text) if text in classes else -1 for text in (truth, answer)]
    return f"{places[0]},{places[1]}"


def confusion(predictions: Sequence[Prediction]) -> Confusion | None:
    """Of the most frequent answers; None where answers are free text, so that those cover less than half."""
    pairs = [_truth_and_answer(line) for line in predictions]
    frequency, classes = Counter(truth for truth, _ in pairs), _classes(predictions)
    covered = sum(frequency[truth] for truth in classes)
    if not pairs or covered < len(pairs) / 2:
        return None
    counts = Counter((truth, answer if answer in classes else None) for truth, answer in pairs)

    def cell(truth: str, answer: str | None) -> Cell:
        count, of = counts[truth, answer], frequency[truth]
        return Cell(
            count=count,
            share=count / of,
            kind="none" if not count else "right" if truth == answer else "wrong",
            title=f"answer: {truth}\nmodel: {'something else' if answer is None else answer}\n"
            f"{count:,} of {of:,} ({percent(count / of)})",
            key=_cell_key(classes, truth, answer),
        )

    columns: list[str | None] = [*classes]
    if any(answer is None for truth, answer in counts if truth in classes):
        columns.append(None)
    note = ""
    if len(frequency) > len(classes):
        share = percent(covered / len(pairs))
        note = f"These are the {len(classes)} most frequent of {len(frequency):,} answers, {share} of the questions."
    return Confusion(
        columns=[name or "other" for name in columns],
        rows=[
            (truth, [cell(truth, answer) for answer in columns], counts[truth, truth] / frequency[truth])
            for truth in classes
        ],
        note=note,
    )


# -- gallery ---------------------------------------------------------------------------------------------------------


def gallery(
    runs: Sequence[Answers], *, data: Path | None, image_root: Path | None, limit: int, megabytes: float, pixels: int
) -> Gallery | None:
    """The questions with their images and answers; None if there are none.

    data         has the turns before the questions, and says where images are that have moved; by default the file that
                 the predictions name, else the one that the settings of the run name, if it is still there
    image_root   of `data`, by default the run's own
    limit        questions of each run
    megabytes    of images in the page; questions for which there is no room are shown without
    pixels       of the longer side of an image

    Raises InputError when a `data` that was given cannot be read.
    """
    chosen = _chosen([run.predictions for run in runs], limit)
    found = [_prompts(run, lines, data, image_root) for run, lines in zip(runs, chosen, strict=True)]
    shown = [
        (place, at, line, prompts.get(at), _images(line, prompts.get(at)))
        for place, (lines, prompts) in enumerate(zip(chosen, found, strict=True))
        for at, line in enumerate(lines)
    ]
    if not shown:
        return None
    album = Album(partial(thumbnail, pixels=pixels), megabytes)
    wrong_first = sorted(shown, key=lambda one: one[2]["correct"])
    album.add(dict.fromkeys(images for *_, images in wrong_first))
    classes = [_classes(run.predictions) for run in runs]
    entries = [
        {
            **_entry(line, prompt, album[images]),
            "order": at,
            "run": place,
            "cell": _cell_key(classes[place], *_truth_and_answer(line)),
        }
        for place, at, line, prompt, images in shown
    ]
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
        runs=[run.run for run in runs],
        note=_note(runs, entries, megabytes),
    )


def _chosen(predictions: Sequence[Sequence[Prediction]], limit: int) -> list[list[Prediction]]:
    """The lines of every run that are shown: of runs that answered the same questions, the same ones."""
    asked = [[(line["id"], line["user"], line["images"]) for line in lines] for lines in predictions]
    if all(one == asked[0] for one in asked):
        correct = [all(line["correct"] for line in lines) for lines in zip(*predictions, strict=True)]
        places = choose(correct, predictions[0], limit)
        return [[lines[at] for at in places] for lines in predictions]
    return [[lines[at] for at in choose([line["correct"] for line in lines], lines, limit)] for lines in predictions]


def choose(correct: Sequence[bool], predictions: Sequence[Prediction], limit: int) -> list[int]:
    """The places of at most `limit` questions, ascending: up to WRONG_SHARE wrong ones, then right ones; different
    images before further questions on the same. The choice is random, but always the same for the same predictions.
    """
    if len(predictions) <= limit:
        return list(range(len(predictions)))
    mixed = random.Random(0).sample(range(len(predictions)), len(predictions))
    first = {tuple(predictions[at]["images"]): at for at in reversed(mixed)}
    ordered = sorted(mixed, key=lambda at: first[tuple(predictions[at]["images"])] != at)
    wrong = [at for at in ordered if not correct[at]]
    right = [at for at in ordered if correct[at]]
    num_wrong = min(len(wrong), max(int(limit * WRONG_SHARE), limit - len(right)))
    return sorted([*wrong[:num_wrong], *right][:limit])


def _prompts(
    run: Answers, lines: Sequence[Prediction], data: Path | None, image_root: Path | None
) -> dict[int, Example]:
    """The questions as the data file has them, by their place in `lines`: with the turns before them, and the images
    as the image root has them now. Those that the file no longer has, or has changed, are left out.
    """
    named = {Path(line["where"].rpartition(":")[0]) for line in lines if line["where"]}
    files = [data] if data else [*sorted(named), *([run.data] if run.data else [])]
    file = next((file for file in files if os.path.isfile(file)), data)  # False for a name that is too long
    if file is None:
        return {}
    root = image_root or (run.image_root if run.image_root and run.image_root.is_dir() else None)
    try:
        prompts = {
            (prompt.where.rpartition(":")[2], prompt.id): prompt
            for example in read_jsonl(file, root)
            for prompt in questions(example)
        }
    except InputError:
        if data or image_root:
            raise
        return {}  # the file has changed since its questions were answered
    found = {}
    for at, line in enumerate(lines):
        prompt = prompts.get((line["where"].rpartition(":")[2], line["id"]))
        if prompt is not None and prompt.turns[-1].user == line["user"]:
            found[at] = prompt
    return found


def _images(line: Prediction, prompt: Example | None) -> tuple[str, ...]:
    """The paths of the images of a question: where they were, else where the data file has them now."""
    now = prompt.images if prompt is not None and len(prompt.images) == len(line["images"]) else line["images"]
    return tuple(was if os.path.exists(was) else is_now for was, is_now in zip(line["images"], now, strict=True))


def _entry(line: Prediction, prompt: Example | None, images: list[int]) -> dict[str, Any]:
    """An entry of the gallery."""
    correct, score, answer = line["correct"], line["anls"], line["prediction"].strip()
    asked = without_tags(line["user"])
    turns: list[tuple[str, str | None, int]] = [(asked, None, len(images))]
    if prompt is not None:
        turns = [(without_tags(turn.user), turn.assistant, len(turn.images)) for turn in prompt.turns]
    mark = "\N{CHECK MARK}" if correct else "\N{BALLOT X}"
    details = {
        "score": f"{'right' if correct else 'wrong'}, ANLS {percent(score)}",
        "answer length": counted(line["num_tokens"], "token") if line["num_tokens"] else "",
        "id": line["id"],
        "source": line["source"],
        "where": line["where"],
        "group": line.get("group", ""),
        "log-probabilities": _log_probs(line.get("label_log_probs") or {}),
    }
    return {
        "group": "right" if correct else "wrong",
        "asked": cut(asked),
        "rows": [
            ("answer", cut(" / ".join(dict.fromkeys(line["answers"]))), ""),
            ("model", f"{cut(answer) or '(nothing)'} {mark}", "good" if correct else "bad"),
        ],
        "foot": line["id"] + (f" · ANLS {percent(score)}" if not correct and score > 0 else ""),
        "images": images,
        "turns": [(cut(user), None if said is None else cut(said), count) for user, said, count in turns],
        "details": [(name, cut(text)) for name, text in details.items() if text],
        "key": f"{line['where'].rpartition(':')[2]} {line['id']} {line['user']}",
        "correct": int(correct),
        "score": score,
        "length": len(answer),
    }


def _log_probs(labels: Mapping[str, float]) -> str:
    best = sorted(labels.items(), key=lambda pair: -pair[1])[:10]
    return ", ".join(f"{label} {number(value)}" for label, value in best)


def _note(runs: Sequence[Answers], entries: Sequence[Mapping[str, Any]], megabytes: float) -> str:
    groups = Counter(entry["group"] for entry in entries)
    predictions = [line for run in runs for line in run.predictions]
    every, wrong = len(predictions), sum(not line["correct"] for line in predictions)
    if groups.total() < every:
        note = f"{groups.total():,} of {every:,} questions, {groups['wrong']:,} of the {wrong:,} wrong ones "
        note += "(--limit shows more). "
    else:
        note = f"All {every:,} questions, {wrong:,} of them answered wrongly. "
    if bare := sum(-1 in entry["images"] for entry in entries):
        note += f"{bare:,} are shown without images, which would take more than {megabytes:g} MB (--picture-mb). "
    return note
