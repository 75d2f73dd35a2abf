"""WebDataset: tar files in which members of one name, 7.jpg and 7.json, are one record."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from phi3v.base import jsonfile
from phi3v.base.errors import InputError
from phi3v.data.layouts.folders import split_of
from phi3v.data.layouts.source import Row, Rows, Source
from phi3v.data.tags import names_image

TEXTS = {"txt": "text", "text": "text", "caption": "caption", "cls": "label"}


def rows(source: Source) -> Rows:
    """The records of a file, or of all in a folder: images, the keys of JSON, and the texts of others."""
    for file in source.files(".tar"):
        split = split_of(file.stem) or split_of(file.parent.name) or "train"
        try:
            with tarfile.open(file, "r|") as archive:
                for (folder, name), members in groupby(filter(tarfile.TarInfo.isfile, archive), _key):
                    yield Row(f"{file}, {posixpath.join(folder, name)}", _record(archive, members), split)
        except tarfile.TarError as error:
            raise InputError(f"{file}: damaged or not fully downloaded ({error})") from error


def _key(member: tarfile.TarInfo) -> tuple[str, str]:
    folder, name = posixpath.split(member.name)
    return folder, name.partition(".")[0]


def _record(archive: tarfile.TarFile, members: Iterable[tarfile.TarInfo]) -> dict[str, Any] | InputError:
    record: dict[str, Any] = {}
    for member in members:
        kind = posixpath.basename(member.name).partition(".")[2].lower()
        content = archive.extractfile(member).read()  # type: ignore[union-attr]
        try:
            if names_image(member.name):
                record.setdefault("images", []).append(content)
            elif kind == "json":
                record |= jsonfile.parse_object(content, member.name)
            else:
                record[TEXTS.get(kind, kind)] = content.decode() if kind in TEXTS else f"{len(content)} bytes"
        except InputError as error:
            return error
        except UnicodeDecodeError as error:
            return InputError(f"{member.name}: not UTF-8 at byte {error.start + 1}")
    return record
