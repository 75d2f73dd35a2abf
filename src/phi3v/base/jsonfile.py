"""JSON that somebody else may have written: what Python can work with, or an error of one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from phi3v.base.errors import InputError

KINDS = {str: "a string", list: "a list", dict: "an object", bool: "true or false", type(None): "null"}

MAX_BYTES = 2**26
"""Largest file that is read: the tokenizer of Phi-3.5-vision has 2 MB, those with the largest vocabularies 35 MB."""

MAX_DEPTH = 64
"""Brackets within brackets. Whatever copies or writes a value later needs some of Python's stack for each."""
TOO_DEEP = f"brackets are nested more than {MAX_DEPTH} deep"


def read_object(file: Path) -> dict[str, Any]:
    """The object in a file. Raises InputError, naming the file, for everything that is none."""
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
    """The object that a text holds; `name` says whose text it is. Raises InputError."""
    try:
        value = parse(content)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{name}: must hold an object, not {KINDS.get(type(value), 'a number')}")
    return value


def parse(content: bytes) -> Any:
    """The value of a JSON text in UTF-8. Raises InputError, which says what is wrong and where."""
    try:
        value = json.loads(content.decode("utf-8-sig"))
        if b"\\ud" in content.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 at byte {error.start + 1}") from error
    except UnicodeEncodeError as error:
        raise InputError("a text holds half of a surrogate pair (\\ud800 to \\udfff)") from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise InputError(f"not JSON: {error.msg} at {line}column {error.colno}") from error
    except ValueError as error:  # a number of 5,000 digits
        raise InputError(f"not JSON: {error}") from error
    except RecursionError:
        raise InputError(TOO_DEEP) from None
    if _is_deeper(value, MAX_DEPTH):
        raise InputError(TOO_DEEP)
    return value


def _is_deeper(value: object, levels: int) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(levels == 0 or _is_deeper(child, levels - 1) for child in children)


class Rule(NamedTuple):
    """What a value must be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]

    def __or__(self, other: Rule) -> Rule:
        return Rule(f"{self.words} or {other.words}", lambda value: self.holds(value) or other.holds(value))


NULL = Rule("null", lambda value: value is None)
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
TEXT = Rule("a string", lambda value: isinstance(value, str))
OBJECT = Rule("an object", lambda value: isinstance(value, dict))


def whole(low: int, high: int) -> Rule:
    return Rule(f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float) -> Rule:
    return Rule(
        f"a number from {low:g} to {high:g}", lambda value: type(value) in (int, float) and low <= value <= high
    )


def one_of(*texts: str) -> Rule:
    return Rule(" or ".join(map(repr, texts)), lambda value: isinstance(value, str) and value in texts)


def several(each: Rule) -> Rule:
    return Rule(
        f"a list, of each {each.words}", lambda value: isinstance(value, list | tuple) and all(map(each.holds, value))
    )


def by_name(each: Rule) -> Rule:
    return Rule(
        f"an object, of each {each.words}",
        lambda value: isinstance(value, dict) and all(map(each.holds, value.values())),
    )


def check_values(place: str, values: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Raises InputError, "place: name is ..., it must be ...", for the first value that breaks its rule."""
    for name, rule in rules.items():
        if not rule.holds(value := values.get(name)):
            raise InputError(f"{place}{name} is {value!r}, it must be {rule.words}")
