"""Hostile variations of honest files: of JSON, value by value, and of any bytes."""

from __future__ import annotations

import json
from random import Random
from typing import Any

HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 255, 2**31, 2**63, 10**30, -(10**30), 1.5, 1e308, float("nan"), float("inf")),
    *("", " ", "\0", "\n", "\x1b[2J", "\ud800", "\u202e", "é", "7", "a" * 300, "a" * 5000, "<|image_1|>", "<|image|>"),
    *("<|image_" + "9" * 5000 + "|>", "<s>", "<|end|>", "(a+)+$", "("),
    *(
        "..",
        "../..",
        "../../etc/passwd",
        "/etc/passwd",
        "/dev/zero",
        "pytorch_model.bin",
        "model.safetensors",
        "evil.py",
    ),
    *("os", "torch", "hub", "evil", "evil.Evil", "LORA", "float32", "phi3_v", "default"),
    *([], {}, [[]], [None], [0] * 1000, ["a"] * 1000, {"": 0}, {"a": {"b": [1]}}, {"content": "a" * 50}),
)
"""Values that something, somewhere, takes for something else."""

WORDS = (
    *("", "id", "type", "content", "role", "model", "dtype", "shape", "data_offsets", "__metadata__", "__class__"),
    *("auto_map", "quantization_config", "attn_implementation", "transformers_weights", "num_labels", "to_dict"),
    *("base_model_name_or_path", "megatron_core", "custom_generate", "vocab_file", "chat_template", "1", "\0"),
)


def mutated_json(content: bytes, random: Random) -> bytes:
    """A JSON text (or its lines) with one to three of its values, keys or elements changed; other bytes as they are."""
    try:
        values = [json.loads(line) for line in content.splitlines() if line.strip()]
        separator = "\n"
    except ValueError:
        try:
            values, separator = [json.loads(content)], ""
        except (ValueError, RecursionError):
            return content
    for _ in range(random.randint(1, 3) if values else 0):
        place = random.randrange(len(values))
        values[place] = _changed(values[place], random)
    return separator.join(map(json.dumps, values)).encode()


def mutated_bytes(content: bytes, random: Random) -> bytes:
    """Bytes cut off, flipped, repeated, moved or made up."""
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
        if not changed:
            return random.randbytes(random.randint(0, 32))
        start = random.randrange(len(changed))
        stop = min(len(changed), start + random.choice((1, 1, 2, 4, 32, 1000)))
        match random.randrange(6):
            case 0:
                del changed[start:]
            case 1:
                changed[start] ^= 1 << random.randrange(8)
            case 2:
                changed[start:stop] = random.choice((b"\0", b"\xff", b"\x7f")) * (stop - start)
            case 3:
                del changed[start:stop]
            case 4:
                changed[start:start] = changed[start:stop] * random.randint(1, 3)
            case _:
                changed[start:stop] = random.randbytes(stop - start)
    return bytes(changed)


def _changed(value: Any, random: Random) -> Any:
    """A copy of a JSON value with something in it changed, more likely deep inside."""
    if not isinstance(value, dict | list) or not value or random.random() < 0.15:
        return random.choice(HOSTILE)
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    place = random.randrange(len(items))
    key, inner = items[place]
    match random.randrange(10):
        case 0:
            del items[place]
        case 1:
            items[place] = (random.choice(WORDS), inner)
        case 2:
            items.append((random.choice(WORDS), random.choice(HOSTILE)))
        case 3:
            items[place] = (key, random.choice(items)[1])
        case _:
            items[place] = (key, _changed(inner, random))
    return dict(items) if isinstance(value, dict) else [inner for _, inner in items]
