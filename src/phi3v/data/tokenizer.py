"""The tokenizer of a model folder, whoever wrote its files.

tokenizer.json is read whole, and of the other files only the few settings that matter. AutoTokenizer would not do: it
takes LlamaTokenizer from tokenizer_config.json, whose own normalizer tokenizes the newline after a special token
differently (14 of the 36 golden texts, transformers 5.17 and 5.23). Nor would `from_pretrained`, because
tokenizer_config.json may name files, arguments and tokens of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from phi3v.base.errors import InputError
from phi3v.base.jsonfile import parse_object

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
SETTINGS = ("chat_template", "clean_up_tokenization_spaces", "model_max_length", "padding_side")


def read_tokenizer(files: Mapping[str, bytes], name: str) -> PreTrainedTokenizerFast:
    """The tokenizer in the files of the folder `name`, by file name. Raises InputError, naming the file."""
    with named_errors(f"{name}/tokenizer.json"):
        backend = Tokenizer.from_buffer(files["tokenizer.json"])
    settings = _settings(files, name, backend)
    with named_errors(f"{name}/tokenizer_config.json"):
        return PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path=name, **settings)


@contextmanager
def named_errors(what: str) -> Iterator[None]:
    """Turn whatever the Rust library tokenizers raises into an InputError: bare Exceptions, and panics."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise InputError(f"{what}: {error}") from error
        raise


def _settings(files: Mapping[str, bytes], name: str, backend: Tokenizer) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        settings |= parse_object(files.get(file, b"{}"), f"{name}/{file}")
    if "chat_template.jinja" in files:
        settings["chat_template"] = files["chat_template.jinja"].decode(errors="replace")
    chosen = {key: settings[key] for key in SETTINGS if settings.get(key) is not None}
    for key in SPECIAL_TOKENS:
        token = settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and backend.token_to_id(token) is not None:
            chosen[key] = token
    return chosen
