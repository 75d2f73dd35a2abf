"""Folders of images or videos, one a class, perhaps below one a split."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from phi3v.base.errors import InputError
from phi3v.data.layouts.source import Row, Rows, Source, files_in, is_other

UNDECODED = re.compile("[\ud800-\udfff]")
"""What Python makes of bytes in a file's name that are not UTF-8."""

SPLIT = re.compile(
    r"(?<![a-z])(?:(train(?:ing)?)|(val(?:id(?:ation)?)?|dev)|test(?:ing)?|evals?|evaluation|hold-?out)(?:set|data)?(?![a-z])"
)


def rows(source: Source, kind: str) -> Rows:
    """A row for every file of every class, both in the order of their names, without hidden ones."""
    files: dict[tuple[str, Path], list[Path]] = {}
    for split, place in _splits(source.path):
        for folder in subfolders(place) if split else [place]:
            files[split, folder] = files_in(folder) if split else []
    names = sorted({folder.name for (_, folder), found in files.items() if found})
    if not names:
        raise InputError(f"{source.path}: there are no folders in it, one a class")
    default = f"Classify the {kind} into one of the following classes: {', '.join(names)}."
    for (split, folder), found in files.items():
        if not found:
            yield Row(str(folder), InputError("it is neither a class, with something in it, nor a split"))
        elif all(file.parent != folder for file in found):
            source.notes[f"the class is {folder.name!r}, not the names of the folders in it"] += len(found)
        for file in found:
            name = str(file.relative_to(source.path))
            row = {"image": name, "question": source.ask(default), "answer": folder.name}
            wrong = InputError("its name is not in UTF-8: rename it") if UNDECODED.search(name) else None
            yield Row(str(file), wrong or row, split)


def _splits(folder: Path) -> Iterator[tuple[str, Path]]:
    """The folders that hold classes, with their split; without one, a folder that is left out.

    Names and depth decide: splits have the names of splits, and folders in them. Raises InputError for other layouts.
    """
    inside = {place: subfolders(place) for place in subfolders(folder)}
    named = {place: split for place in inside if (split := split_of(place.name))}
    within = [[place.name for place in places] for places in inside.values()]
    if named and (len(named) == len(inside) or (len(named) > 1 and all(inside[place] for place in named))):
        if bare := next((place for place in named if not inside[place]), None):
            raise InputError(f"{bare} is a split without folders of classes in it")
        yield from ((named.get(place, ""), place) for place in inside)
    elif (
        len(inside) == 1 and within[0] and all(path in inside or is_other(path.name) for path in folder.iterdir())
    ):  # a folder around everything
        yield from _splits(*inside)
    elif {"images", "labels"} <= {place.name for place in inside}:
        raise InputError(f"{folder} holds images and labels: boxes (YOLO) are not converted")
    elif len(within) > 1 and len(within[0]) > 1 and within.count(within[0]) == len(within):
        there = ", ".join(place.name for place in inside)
        raise InputError(f"{folder}: {there} hold the same folders, so they are no classes: convert each by itself")
    else:
        yield "train", folder


def split_of(name: str) -> str | None:
    """train, val or test, if a name says so: Training, val2017, seg_test, test_set, ..."""
    found = SPLIT.search(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    return found and ("train" if found[1] else "val" if found[2] else "test")


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder that may be data: not hidden, no system's own, none that `phi3v convert` wrote."""
    found = (path for path in folder.iterdir() if path.is_dir() and not is_other(path.name))
    return sorted(path for path in found if not ((path / "images").is_dir() and any(path.glob("*.jsonl"))))
