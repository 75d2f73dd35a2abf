"""Fixtures of all tests. What is not shipped (the real tokenizer) makes its tests skip, with the reason."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

HERE = Path(__file__).parent
REAL_TOKENIZER = Path(os.environ.get("PHI3V_TOKENIZER", HERE.parent / "../shared/golden/tokenizer"))

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{- '<|assistant|>\n' -}}{% endif %}"
)
ADDED_TOKENS = """
    <|endoftext|> <|assistant|> <|placeholder1|> <|placeholder2|> <|placeholder3|> <|placeholder4|> <|system|> <|end|>
    <|placeholder5|> <|placeholder6|> <|user|> <|image|>
"""
NOT_RSTRIP = {"<|endoftext|>", "<|system|>", "<|end|>", "<|user|>"}
WORDS = "▁the ▁what ▁is ▁color ▁shape ▁in ▁this ▁picture ▁red ▁blue ▁circle ▁square ▁yes ▁no ▁answer ▁briefly"


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Outputs of the original implementation; tests/golden."""
    return HERE / "golden"


@pytest.fixture(scope="session")
def real_tokenizer_dir() -> Path:
    """Folder of the real Phi-3.5-vision tokenizer, 32045 tokens."""
    if not (REAL_TOKENIZER / "tokenizer.json").is_file():
        pytest.skip("the real Phi-3.5-vision tokenizer is not here: set PHI3V_TOKENIZER to its folder")
    return REAL_TOKENIZER


@pytest.fixture(scope="session")
def tiny_processor_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a processor with a tiny tokenizer (429 tokens) built like the real one, num_crops 4."""
    folder = tmp_path_factory.mktemp("tiny_processor")
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<s>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "legacy": False,
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "padding_side": "right",
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({"num_crops": 4, "num_img_tokens": 144}))
    return folder


def tiny_tokenizer() -> Tokenizer:
    """The real tokenizer's normaliser, byte fallback, decoder and special tokens over an alphabet and a few words."""
    letters = ["▁", *map(chr, range(33, 127))]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS.split():
        merges |= {(word[:k], word[k]): None for k in range(1, len(word))}
    vocabulary = {piece: k for k, piece in enumerate(dict.fromkeys([*pieces, *map("".join, merges)]))}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=list(merges), unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>")])
    tokenizer.add_tokens([AddedToken("</s>", normalized=False, special=False, rstrip=True)])
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True, rstrip=token not in NOT_RSTRIP)
            for token in ADDED_TOKENS.split()
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer
