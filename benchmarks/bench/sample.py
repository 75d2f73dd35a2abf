"""What is timed: small random models in the real one's proportions, and pages of noise with questions."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from phi3v.data.encode import Encoded, Example, Turn
from phi3v.data.processor import Phi3VProcessor
from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.model.parts import add_lora, freeze, set_precision
from phi3v.model.quantization import Quantization, quantize
from phi3v.packing.loader import Reading, training_packs
from phi3v.packing.pack import Pack
from phi3v.packing.schedule import ScheduleSettings, Step, schedule_epoch
from phi3v.packing.trees import Lengths, PackLimits

Mode = Literal["full", "frozen", "lora", "qlora"]
Task = Literal["docvqa", "nlvr2", "memes", "ucf101"]

WORDS = ("what", "is", "written", "in", "line", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ANSWER = "seven eight nine"


class Shape(NamedTuple):
    """What an example of a task looks at."""

    images: int
    size: tuple[int, int]
    """Width and height in pixels."""
    num_crops: int


SHAPES: dict[Task, Shape] = {
    "docvqa": Shape(1, (1275, 1650), 16),
    "nlvr2": Shape(2, (1024, 768), 16),
    "memes": Shape(1, (800, 600), 16),
    "ucf101": Shape(8, (320, 240), 4),
}


SIZES: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 1365,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "vision_config": {"hidden_size": 160, "intermediate_size": 640, "num_hidden_layers": 6, "num_attention_heads": 5},
}
"""The real model's proportions: head and vision weigh about what they weigh there."""


def config_of(processor: Phi3VProcessor, sizes: Mapping[str, Any]) -> Phi3VConfig:
    """Of a model for random weights, with the processor's tokens; sizes that are not given are the real model's."""
    ones = [1.0] * (sizes.get("hidden_size", 3072) // sizes.get("num_attention_heads", 32) // 2)
    return Phi3VConfig(
        rope_scaling={"type": "su", "short_factor": ones, "long_factor": ones},
        image_token_id=processor.image_token_id,
        pad_token_id=processor.pad_token_id,
        **sizes,
    )


def build_model(mode: Mode, processor: Phi3VProcessor, device: torch.device, dtype: torch.dtype) -> Any:
    """Random weights, 24 million of them instead of four billion."""
    torch.manual_seed(0)
    return prepare(Phi3VForCausalLM(config_of(processor, SIZES)).to(device), mode, dtype)


def prepare(model: Any, mode: Mode, dtype: torch.dtype) -> Any:
    """Sets what learns: all of it, all but the image embedder, or adapters everywhere, over 4-bit weights or not."""
    if mode == "qlora":
        where = next(model.parameters()).device
        freeze(model, ())
        quantize(model, Quantization(), compute_dtype=dtype, device=None if where.type == "meta" else where)
    if mode in ("lora", "qlora"):
        model = add_lora(model, frozen=(), rank=64, alpha=256, dropout=0.0, init="default", dora=False, rslora=False)
    else:
        freeze(model, ("vision", "projector") if mode == "frozen" else ())
    set_precision(model, dtype)
    return model.train()


def make_examples(folder: Path, shape: Shape, pages: int, questions: int) -> list[Example]:
    """Pages of noise with questions about them, page by page."""
    pick, noise, found = random.Random(0), np.random.default_rng(0), []
    for page in range(pages):
        files = []
        for number in range(shape.images):
            file = folder / f"{page}-{number}.png"
            if not file.exists():
                width, height = shape.size
                picture = noise.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
                Image.fromarray(picture).resize(shape.size).save(file, compress_level=1)
            files.append(str(file))
        for question in range(questions):
            turn = Turn(user=" ".join(pick.choices(WORDS, k=12)), assistant=ANSWER, images=tuple(files))
            found.append(Example(id=f"{page}-{question}", turns=(turn,)))
    return found


def packs_of(
    encoded: Sequence[Encoded], processor: Phi3VProcessor, savings: frozenset[str], limits: PackLimits
) -> tuple[list[Pack], Step]:
    """One optimizer step over all the examples, laid out as `savings` say."""
    limits = replace(limits, share_prefix="pages" in savings, pack="packs" in savings)
    plan = schedule_epoch(
        Lengths.of(encoded), ScheduleSettings(batch_size=len(encoded), limits=limits), seed=0, epoch=0
    )
    reading = Reading(image_token_id=processor.image_token_id, num_crops=processor.num_crops)
    micros = list(training_packs(encoded, plan, reading))
    return [micro.pack for micro in micros], micros[0].step
