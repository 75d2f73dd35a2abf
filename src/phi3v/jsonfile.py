"""JSON that somebody else may have written: what Python can work with, or an error of one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from phi3v.errors import InputError

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
