"""JSON that somebody else may have written: decoded and validated by msgspec, or an error of one line."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from phi3v.base.errors import InputError

T = TypeVar("T")

KINDS = {str: "a string", list: "a list", dict: "an object", bool: "true or false", type(None): "null"}
NAMES = {"int": "an integer", "float": "a number", "str": "a string", "bool": "true or false", "array": "a list"}
NAMES |= {"object": "an object", "null": "null"}
BOUNDS = {">=": "at least", ">": "greater than", "<=": "at most", "<": "less than"}

MAX_BYTES = 2**26
"""Largest file that is read: the tokenizer of Phi-3.5-vision has 2 MB, those with the largest vocabularies 35 MB."""

# Types with limits. The limit belongs to the type, so that no renaming of a field can lose it.
Count = Annotated[int, Meta(ge=1)]
NonNegativeInt = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
NonNegative = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]


def read_object(file: Path) -> dict[str, Any]:
    """The object in a file. Raises InputError, naming the file, for anything else."""
    return parse_object(read_bytes(file), file)


def read_bytes(file: Path) -> bytes:
    """The content of a file of at most MAX_BYTES. Raises InputError, naming the file."""
    try:
        if file.exists() and not file.is_file():
            raise InputError(f"{file}: not a file")
        with open(file, "rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise InputError(f"{file}: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > MAX_BYTES:
        raise InputError(f"{file}: larger than {MAX_BYTES / 2**20:.0f} MiB")
    return content


def parse_object(content: bytes, name: Path | str) -> dict[str, Any]:
    """The object that a JSON text holds; `name` is the origin of the text for the message. Raises InputError."""
    try:
        value = parse(content)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{name}: must hold an object, not {KINDS.get(type(value), 'a number')}")
    return value


def parse(content: bytes) -> Any:
    """The value of a JSON text in UTF-8. Raises InputError with the position of what is wrong."""
    text = content.removeprefix(b"\xef\xbb\xbf")
    try:
        text.decode()  # msgspec counts the position of a wrong byte from the start of its string
        return msgspec.json.decode(text)
    except msgspec.MsgspecError as error:
        reason = str(error).removeprefix("JSON is malformed: ")
        if (at := re.search(r"\(byte (\d+)\)", reason)) and b"\n" in (before := text[: int(at[1])]):
            line = before.count(b"\n") + 1
            reason = reason.replace(at[0], f"(line {line})")
        raise InputError(f"not JSON: {reason}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 at byte {error.start + 1}") from error
    except RecursionError:
        raise InputError("not JSON: brackets are nested too deep") from None


def convert(value: Any, kind: type[T], place: str, *, strict: bool = True) -> T:
    """`value`, as decoded from JSON, as an instance of `kind`: a dataclass, or a type with limits.

    Unless `strict`, a text may stand for a number: in YAML 2e-4 is a text.
    Raises InputError, "place: field: must be ..., not ...", for the first value that does not fit.
    """
    try:
        return msgspec.convert(value, kind, strict=strict, dec_hook=_decode)
    except msgspec.ValidationError as error:
        path, problem = _explain(error, kind)
        raise InputError(": ".join(filter(None, (place, path, problem)))) from None


def check_values(place: str, values: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Raises InputError, "place: name is ..., it must be ...", for the first value that does not fit its type."""
    for name, kind in kinds.items():
        if problem := problem_of(value := values.get(name), kind):
            raise InputError(f"{place}{name} is {value!r}, it {problem}")


def problem_of(value: Any, kind: Any) -> str | None:
    """What is wrong with a value, "must be at least 1", or None if it fits the type."""
    try:
        msgspec.convert(value, kind, dec_hook=_decode)
    except msgspec.ValidationError as error:
        return _explain(error, kind)[1]
    return None


def _decode(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    raise ValueError(f"Expected `{kind.__name__}`, got `{type(value).__name__}`")


def _explain(error: msgspec.ValidationError, kind: Any) -> tuple[str, str]:
    """Where in the value, "data.batch_size", and what is wrong there, in our words."""
    text, _, where = str(error).partition(" - at `")
    path = where.rstrip("`").removeprefix("$").lstrip(".")
    if missing := re.fullmatch(r"Object missing required field `(\w+)`", text):
        return f"{path}.{missing[1]}".lstrip("."), "is missing"
    if re.fullmatch(r"Expected `\w+` of length >= 1", text):
        return path, "is empty"
    if bound := re.fullmatch(r"Expected `\w+` (>=|>|<=|<) ([\d.]+)", text):
        return path, f"must be {BOUNDS[bound[1]]} {float(bound[2]):g}"
    if got := re.fullmatch(r"Expected `([\w |]+)`, got `(\w+)`", text):
        wanted = " or ".join(NAMES.get(name, name) for name in got[1].split(" | "))
        return path, f"must be {wanted}, not {NAMES.get(got[2], got[2])}"
    if choice := re.fullmatch(r"Invalid enum value '?(.*?)'?", text):
        return path, f"must be {', '.join(_choices(kind, path))}, not {choice[1]!r}"
    return path, "must be smaller" if "out of range" in text else text.replace("`", "")


def _choices(kind: Any, path: str) -> list[str]:
    """The values that a Literal allows at a path of dataclass fields."""
    for name in re.findall(r"[a-z_]+", path):
        if dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind, include_extras=True)[name]
    if typing.get_origin(kind) is Literal:
        return list(map(str, typing.get_args(kind)))
    return [choice for argument in typing.get_args(kind) for choice in _choices(argument, "")]
