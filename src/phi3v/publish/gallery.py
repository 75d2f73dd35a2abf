"""What models answered, as a page shows it: which answers are confused, and the questions as a gallery."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
from phi3v.publish.html import Gallery, cut, without_tags
from phi3v.publish.html.pictures import Album, thumbnail

MAX_CLASSES = 15
WRONG_SHARE = 2 / 3  # of the questions that are shown, if not all are


class Answers(NamedTuple):
    """The predictions of one run, and the file of questions they may be from, besides the one they name."""

    run: str
    predictions: Sequence[Prediction]
    data: Path | None
    image_root: Path | None


# ---- confusion -----------------------------------------------------------------------------------------------------


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
    """Rows are accepted answers, columns what the model said; the last column counts everything else it said."""

    columns: list[str]
    rows: list[tuple[str, list[Cell], float]]
    note: str


def _truth_and_said(line: Prediction) -> tuple[str, str]:
    """Of several accepted answers the one that was given, else the first."""
    said = normalize_answer(line["prediction"])
    accepted = [normalize_answer(answer) for answer in line["answers"]]
    return (said if said in accepted else accepted[0]), said


def _classes(pairs: Iterable[tuple[str, str]]) -> list[str]:
    return [answer for answer, _ in Counter(truth for truth, _ in pairs).most_common(MAX_CLASSES)]


def confusion(predictions: Sequence[Prediction]) -> Confusion | None:
    """Of the most frequent answers; None where answers are free text, so that those cover less than half."""
    pairs = [_truth_and_said(line) for line in predictions]
    frequency = Counter(truth for truth, _ in pairs)
    classes = _classes(pairs)
    covered = sum(frequency[answer] for answer in classes)
    if covered < len(pairs) / 2 or not pairs:
        return None
    counts = Counter((truth, said if said in classes else None) for truth, said in pairs)

    def cell(truth: str, said: str | None) -> Cell:
        count = counts[truth, said]
        share = count / frequency[truth]
        kind = "none" if not count else "right" if truth == said else "wrong"
        title = (
            f"answer: {truth}\nmodel: {said or 'something else'}\n{count:,} of {frequency[truth]:,} ({percent(share)})"
        )
        return Cell(count=count, share=share, kind=kind, title=title, key=_cell_key(classes, truth, said))

    columns: list[str | None] = [*classes]
    if any(said is None for truth, said in counts if truth in classes):
        columns.append(None)
    rows = [
        (truth, [cell(truth, said) for said in columns], counts[truth, truth] / frequency[truth]) for truth in classes
    ]
    note = ""
    if len(frequency) > len(classes):
        share = percent(covered / len(pairs))
        note = f"These are the {len(classes)} most frequent of {len(frequency):,} answers, {share} of the questions."
    return Confusion(columns=[name or "other" for name in columns], rows=rows, note=note)


def _cell_key(classes: Sequence[str], truth: str, said: str | None) -> str:
    places = [classes.index(answer) if answer in classes else -1 for answer in (truth, said)]
    return f"{places[0]},{places[1]}"


# ---- gallery -------------------------------------------------------------------------------------------------------


def gallery(
    runs: Sequence[Answers], *, data: Path | None, image_root: Path | None, limit: int, picture_mb: float, pixels: int
) -> Gallery | None:
    """The questions with their pictures and answers; None if there are none.

    data         of the questions, for the turns before them and for pictures that are no longer where they were; by
                 default the file that the predictions name, else the run's own, if it is still there
    image_root   of `data`, by default the run's own
    limit        questions of each run
    picture_mb   megabytes of pictures in the page; questions that have no room are shown without
    pixels       of the longer side of a picture

    Raises InputError when a `data` that was given cannot be read.
    """
    chosen = _chosen([run.predictions for run in runs], limit)
    found = [_prompts(run, lines, data, image_root) for run, lines in zip(runs, chosen, strict=True)]
    images = [
        [_images(lines[at], prompts.get(at)) for at in range(len(lines))]
        for lines, prompts in zip(chosen, found, strict=True)
    ]
    album = Album(partial(thumbnail, pixels=pixels), picture_mb)
    album.take(_most_telling_first(chosen, images))
    entries = []
    for number_of_run, run in enumerate(runs):
        classes = _classes(map(_truth_and_said, run.predictions))
        for at, line in enumerate(chosen[number_of_run]):
            entry = _entry(line, found[number_of_run].get(at), album[images[number_of_run][at]])
            truth, said = _truth_and_said(line)
            entries.append({**entry, "order": at, "run": number_of_run, "cell": _cell_key(classes, truth, said)})
    if not entries:
        return None
    return Gallery(
        entries=entries,
        pictures=album.pictures,
        groups=[("", "All"), ("wrong", "Wrong"), ("right", "Right")],
        sorts=[
            ("Wrong first", "correct", 1),
            ("Lowest score first", "score", 1),
            ("Longest answer first", "length", -1),
            ("As in the file", "order", 1),
        ],
        runs=[run.run for run in runs],
        note=_note(runs, chosen, entries, picture_mb),
    )


def _chosen(predictions: Sequence[Sequence[Prediction]], limit: int) -> list[list[Prediction]]:
    """What is shown of every run: of runs that answered the same questions, the same ones."""
    asked = [[(line["id"], line["user"], line["images"]) for line in lines] for lines in predictions]
    if all(one == asked[0] for one in asked):
        correct = [all(line["correct"] for line in lines) for lines in zip(*predictions, strict=True)]
        places = choose(correct, predictions[0], limit)
        return [[lines[at] for at in places] for lines in predictions]
    return [[lines[at] for at in choose([line["correct"] for line in lines], lines, limit)] for lines in predictions]


def choose(correct: Sequence[bool], predictions: Sequence[Prediction], limit: int) -> list[int]:
    """The places of at most `limit` questions, in their order: up to WRONG_SHARE wrong ones, then right ones; different
    pictures before the same again. The choice is random, but always the same for the same predictions.
    """
    if len(predictions) <= limit:
        return list(range(len(predictions)))
    mixed = random.Random(0).sample(range(len(predictions)), len(predictions))
    ordered = _fresh_first(mixed, [tuple(line["images"]) for line in predictions])
    wrong = [at for at in ordered if not correct[at]]
    right = [at for at in ordered if correct[at]]
    num_wrong = min(len(wrong), max(int(limit * WRONG_SHARE), limit - len(right)))
    return sorted([*wrong[:num_wrong], *right][:limit])


def _fresh_first(order: Iterable[int], images: Sequence[tuple[str, ...]]) -> list[int]:
    """The first question on its pictures before those that look at them again."""
    seen: set[tuple[str, ...]] = set()
    fresh: list[int] = []
    again: list[int] = []
    for at in order:
        (again if images[at] in seen else fresh).append(at)
        seen.add(images[at])
    return fresh + again


def _most_telling_first(
    chosen: Sequence[Sequence[Prediction]], images: Sequence[Sequence[Sequence[str]]]
) -> list[Sequence[str]]:
    """The pictures of all questions, in the order in which the page should take them: those of wrong answers first."""
    every = [
        (bool(line["correct"]), tuple(paths))
        for lines, of_run in zip(chosen, images, strict=True)
        for line, paths in zip(lines, of_run, strict=True)
    ]
    return [list(paths) for paths in dict.fromkeys(paths for _, paths in sorted(every, key=lambda pair: pair[0]))]


def _prompts(
    run: Answers, lines: Sequence[Prediction], data: Path | None, image_root: Path | None
) -> dict[int, Example]:
    """The questions in the file they are from, by their place in `lines`: with turns before them, and images as the
    image root has them now. Those that are not there any more, or have changed, are left out.
    """
    named = {Path(line["where"].rpartition(":")[0]) for line in lines if line.get("where")}
    files = [data] if data else [*sorted(named), *([run.data] if run.data else [])]
    file = next((file for file in files if os.path.isfile(file)), data)  # no name is too long for it
    if file is None:
        return {}
    root = image_root or (run.image_root if run.image_root and os.path.isdir(run.image_root) else None)
    try:
        prompts = {
            (prompt.where.rpartition(":")[2], prompt.id): prompt
            for example in read_jsonl(file, root)
            for prompt in questions(example)
        }
    except InputError:
        if data or image_root:
            raise
        return {}  # it was fit when it was answered, and has become something else since
    found = {}
    for at, line in enumerate(lines):
        prompt = prompts.get((line.get("where", "").rpartition(":")[2], line["id"]))
        if prompt is not None and prompt.turns[-1].user == line["user"]:
            found[at] = prompt
    return found


def _images(line: Prediction, prompt: Example | None) -> list[str]:
    """Where the pictures of a question are: where they were, else where the data file has them now."""
    now = prompt.images if prompt is not None and len(prompt.images) == len(line["images"]) else line["images"]
    return [was if os.path.exists(was) else is_now for was, is_now in zip(line["images"], now, strict=True)]


def _entry(line: Prediction, prompt: Example | None, images: list[int]) -> dict[str, Any]:
    """An entry of the gallery."""
    correct = bool(line["correct"])
    asked = without_tags(line["user"])
    said = line["prediction"].strip()
    expected = " / ".join(dict.fromkeys(line["answers"]))
    score = float(line.get("anls", correct))
    turns: list[tuple[str, str | None, int]] = [(asked, None, len(images))]
    if prompt is not None:
        turns = [(without_tags(turn.user), turn.assistant, len(turn.images)) for turn in prompt.turns]
    mark = "\N{CHECK MARK}" if correct else "\N{BALLOT X}"
    details = {
        "score": f"{'right' if correct else 'wrong'}, ANLS {percent(score)}",
        "answer length": counted(line["num_tokens"], "token") if line.get("num_tokens") else "",
        "id": line["id"],
        "source": line.get("source", ""),
        "where": line.get("where", ""),
        "group": line.get("group", ""),
        "log-probabilities": _likelihoods(line.get("label_log_probs") or {}),
    }
    return {
        "group": "right" if correct else "wrong",
        "asked": cut(asked),
        "rows": [
            ("answer", cut(expected), ""),
            ("model", f"{cut(said) or '(nothing)'} {mark}", "good" if correct else "bad"),
        ],
        "foot": line["id"] + (f" · ANLS {percent(score)}" if not correct and score > 0 else ""),
        "images": images,
        "turns": [(cut(user), None if said is None else cut(said), count) for user, said, count in turns],
        "details": [(name, cut(text)) for name, text in details.items() if text],
        "key": f"{line.get('where', '').rpartition(':')[2]} {line['id']} {line['user']}",
        "correct": int(correct),
        "score": score,
        "length": len(said),
    }


def _likelihoods(labels: Mapping[str, float]) -> str:
    best = sorted(labels.items(), key=lambda pair: -pair[1])[:10]
    return ", ".join(f"{label} {number(value)}" for label, value in best)


def _note(
    runs: Sequence[Answers],
    chosen: Sequence[Sequence[Prediction]],
    entries: Sequence[Mapping[str, Any]],
    picture_mb: float,
) -> str:
    every, shown = sum(len(run.predictions) for run in runs), len(entries)
    wrong = sum(not line["correct"] for run in runs for line in run.predictions)
    wrong_shown = sum(entry["group"] == "wrong" for entry in entries)
    bare = sum(-1 in entry["images"] for entry in entries)
    if shown < every:
        note = f"{shown:,} of {every:,} questions, {wrong_shown:,} of the {wrong:,} wrong ones (--limit shows more). "
    else:
        note = f"All {every:,} questions, {wrong:,} of them answered wrongly. "
    if bare:
        note += f"{bare:,} are shown without pictures, which would take more than {picture_mb:g} MB (--picture-mb). "
    return note
