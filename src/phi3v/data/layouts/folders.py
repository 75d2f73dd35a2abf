"""Folders of images or videos, one a class, perhaps below one a split."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from phi3v.base.errors import InputError
from phi3v.data.layouts.source import Row, Rows, Source

NOT_DATA = ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini")
"""What operating systems leave in folders, besides hidden files."""

UNDECODED = re.compile("[\ud800-\udfff]")
"""What Python makes of bytes in a file's name that are not UTF-8."""

SPLIT = re.compile(
    r"(?<![a-z])(?:(train(?:ing)?)|(val(?:id(?:ation)?)?|dev)|test(?:ing)?|evals?|evaluation|hold-?out)(?:set|data)?(?![a-z])"
)


def image_rows(source: Source) -> Rows:
    """The images of classes."""
    return rows(source, "image")


def video_rows(source: Source) -> Rows:
    """The videos of classes."""
    return rows(source, "video")


def rows(source: Source, kind: str) -> Rows:
    """A row for every file of every class, both in the order of their names, without hidden ones."""
    places = list(_splits(source.path))
    files = {(split, folder): list(_files(folder)) for split, place in places if split for folder in subfolders(place)}
    names = sorted({folder.name for (_, folder), found in files.items() if found})
    if not names:
        raise InputError(f"{source.path}: there are no folders in it, one a class")
    default = f"Classify the {kind} into one of the following classes: {', '.join(names)}."
    for split, place in places:
        if not split:
            yield Row(str(place), InputError("it is neither a split nor a class"))
    for (split, folder), found in files.items():
        if not found:
            yield Row(str(folder), InputError("there is nothing in it"))
        if found and all(file.parent != folder for file in found):
            source.notes[f"the class is {folder.name!r}, not the names of the folders in it"] += len(found)
        for file in found:
            name = str(file.relative_to(source.path))
            row = {"image": name, "question": source.ask(default), "answer": folder.name}
            yield Row(
                str(file), InputError("its name is not in UTF-8: rename it") if UNDECODED.search(name) else row, split
            )


def _splits(folder: Path) -> Iterator[tuple[str, Path]]:
    """The folders that hold classes, with their split; without one, a folder that is left out.

    Names and depth decide: splits have the names of splits, and folders in them. Raises InputError for other layouts.
    """
    inside = subfolders(folder)
    named = {place: split for place in inside if (split := split_of(place.name))}
    if named and (len(named) == len(inside) or (len(named) > 1 and all(map(subfolders, named)))):
        for place in inside:
            if place in named and not subfolders(place):
                raise InputError(f"{place} is a split without folders of classes in it")
            yield named.get(place, ""), place
        return
    if len(inside) == 1 and subfolders(inside[0]) and not list(_files(folder, "*")):
        yield from _splits(inside[0])  # a folder around everything
        return
    within = [{place.name for place in subfolders(one)} for one in inside]
    if {"images", "labels"} <= {place.name for place in inside}:
        raise InputError(f"{folder} holds images and labels: boxes (YOLO) are not converted")
    if len(within) > 1 and len(within[0]) > 1 and within.count(within[0]) == len(within):
        there = ", ".join(place.name for place in inside)
        raise InputError(f"{folder}: {there} hold the same folders, so they are no classes: convert each by itself")
    yield "train", folder


def split_of(name: str) -> str | None:
    """train, val or test, if a name says so: Training, val2017, seg_test, test_set, ..."""
    if (found := SPLIT.search(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())) is None:
        return None
    return "train" if found[1] else "val" if found[2] else "test"


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder that may be data: not hidden, no system's own, none that `phi3v convert` wrote."""
    found = (path for path in folder.iterdir() if path.is_dir() and not _is_other(path))
    return sorted(path for path in found if not ((path / "images").is_dir() and any(path.glob("*.jsonl"))))


def _files(folder: Path, pattern: str = "**/*") -> Iterator[Path]:
    """The files in a folder that may be data."""
    for path in sorted(folder.glob(pattern)):
        if path.is_file() and not any(map(_is_other, [path, *path.relative_to(folder).parents[:-1]])):
            yield path


def _is_other(path: Path) -> bool:
    return path.name.startswith(".") or path.name in NOT_DATA
