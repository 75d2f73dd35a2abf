from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phi3v.base.errors import InputError
from phi3v.data.tokenizer import read_tokenizer


@pytest.fixture
def files(tiny_processor_dir: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in tiny_processor_dir.iterdir()}


def changed(content: bytes, **settings: Any) -> bytes:
    return json.dumps(json.loads(content) | settings).encode()


def test_only_known_settings_are_obeyed(files: dict[str, bytes]) -> None:
    files["tokenizer_config.json"] = changed(
        files["tokenizer_config.json"],
        vocab_file="/etc/passwd",
        tokenizer_file="/etc/passwd",
        init_inputs=["x"],
        auto_map={"AutoTokenizer": ["evil.Evil", None]},
        eos_token={"__type": "AddedToken", "content": "<|end|>"},
        unk_token="a token that no vocabulary has",
        model_max_length=7,
        added_tokens_decoder={"5": {"content": "more"}},
    )
    tokenizer = read_tokenizer(files, "here")
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == ("<|end|>", "<|endoftext|>", 7)
    assert tokenizer.unk_token is None
    assert not hasattr(tokenizer, "vocab_file")
    assert json.loads(tokenizer.backend_tokenizer.to_str()) == json.loads(files["tokenizer.json"])


def test_a_template_in_a_file_of_its_own_comes_first(files: dict[str, bytes]) -> None:
    files["chat_template.jinja"] = b"{{ 1 }}"
    assert read_tokenizer(files, "here").chat_template == "{{ 1 }}"


@pytest.mark.parametrize(
    ("file", "settings", "message"),
    [
        ("tokenizer_config.json", {"chat_template": [{}]}, "here/tokenizer_config.json: "),
        ("tokenizer_config.json", {"padding_side": "top"}, "here/tokenizer_config.json: Padding side"),
        ("tokenizer.json", {"model": 7}, "here/tokenizer.json: "),
    ],
)
def test_what_is_wrong(files: dict[str, bytes], file: str, settings: dict[str, Any], message: str) -> None:
    files[file] = changed(files[file], **settings)
    with pytest.raises(InputError, match=message):
        read_tokenizer(files, "here")
