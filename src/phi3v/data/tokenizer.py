"""The tokenizer of a model folder, whoever wrote its files.

Of tokenizer.json everything counts that bounds what it can make of a text; of the other files only the few settings
that matter here. AutoTokenizer would not do: it takes LlamaTokenizer from tokenizer_config.json, whose own normaliser
tokenises the newline after a special token differently (14 of the 36 golden texts, transformers 5.17 and 5.23). Nor
would `from_pretrained`, for which tokenizer_config.json may name files, arguments and tokens of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from phi3v.base.errors import InputError
from phi3v.base.jsonfile import KINDS, check_values, parse_object

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
SETTINGS: dict[str, type] = {
    "chat_template": str,
    "clean_up_tokenization_spaces": bool,
    "model_max_length": int,
    "padding_side": str,
}

MAX_TOKEN_ID = 2**20
MAX_TOKEN_LENGTH = 1000
"""Above those of the largest vocabularies there are; a thousand tokens of an answer are as many texts."""

REPLACEMENTS = ("content", "prepend", "precompiled_charsmap")
MAX_GROWTH = 1000
"""Bytes a tokenizer may make of one. By the rule of `_growth` the published one may make 9, of which it makes 6."""


def read_tokenizer(files: Mapping[str, bytes], name: str) -> PreTrainedTokenizerFast:
    """The tokenizer in the files of the folder `name`, by their names. Raises InputError, naming the file."""
    place = f"{name}/tokenizer.json"
    content = parse_object(files["tokenizer.json"], place)
    check_values(f"{place}: ", content, {"model": dict})
    # Another prefix makes the library panic.
    check_values(f"{place}: model.", content["model"], {"continuing_subword_prefix": Literal[""] | None})
    if (growth := _growth(content)) > MAX_GROWTH:
        raise InputError(f"{place}: it may make {growth:,} bytes of one, at most {MAX_GROWTH:,} are allowed")
    with named_errors(place):
        backend = Tokenizer.from_buffer(files["tokenizer.json"])
    vocabulary = backend.get_vocab()
    if (highest := max(vocabulary.values(), default=0)) > MAX_TOKEN_ID:
        raise InputError(f"{place}: a token has id {highest:,}, at most {MAX_TOKEN_ID:,} is allowed")
    if (longest := max(map(len, vocabulary), default=0)) > MAX_TOKEN_LENGTH:
        raise InputError(f"{place}: a token has {longest:,} characters, at most {MAX_TOKEN_LENGTH:,} are allowed")
    settings = _settings(files, name, backend)
    with named_errors(place):  # it writes the tokenizer out and reads it again
        return PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path=name, **settings)


@contextmanager
def named_errors(what: str) -> Iterator[None]:
    """Makes an InputError of whatever the Rust library tokenizers raises: bare Exceptions, and for bugs a panic."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise InputError(f"{what}: {error}") from error
        raise


def _settings(files: Mapping[str, bytes], name: str, backend: Tokenizer) -> dict[str, Any]:
    place = f"{name}/tokenizer_config.json"
    settings: dict[str, Any] = {}
    chosen: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        settings |= parse_object(files.get(file, b"{}"), f"{name}/{file}")
    if "chat_template.jinja" in files:
        settings["chat_template"] = files["chat_template.jinja"].decode(errors="replace")
    for key, kind in SETTINGS.items():
        if (value := settings.get(key)) is not None:
            if type(value) is not kind:
                raise InputError(f"{place}: {key} must be {KINDS.get(kind, 'a whole number')}")
            chosen[key] = value
    if chosen.get("padding_side", "right") not in ("left", "right"):
        raise InputError(f"{place}: padding_side must be left or right, not {chosen['padding_side']!r}")
    for key in SPECIAL_TOKENS:
        token = settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and backend.token_to_id(token) is not None:
            chosen[key] = token
    return chosen


def _growth(tokenizer: Mapping[str, Any]) -> int:
    """The most bytes that normalizer and decoder can make of one: replacements multiply, one after the other."""
    growth, left = 1, [tokenizer.get("normalizer"), tokenizer.get("decoder")]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            written = [value[key] for key in REPLACEMENTS if isinstance(value.get(key), str)]
            growth *= len("".join(written).encode()) or 1
            left += value.values()
        elif isinstance(value, list):
            left += value
    return growth
