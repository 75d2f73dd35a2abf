"""The data and the model of a plan: lengths of the examples and sizes of the model, without loading either."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from phi3v.base.config import Run
from phi3v.base.errors import InputError
from phi3v.data.encode import encode
from phi3v.data.image import hd_size, num_image_tokens, num_tiles, read_size
from phi3v.data.processor import IMAGE_TAG, Phi3VProcessor
from phi3v.data.schema import NAMES_KEPT, iter_jsonl
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.loading import load_config
from phi3v.packing.trees import Lengths
from phi3v.recipes import easy_vqa, tiny

PUBLISHED = {"microsoft/Phi-3.5-vision-instruct": 4, "microsoft/Phi-3-vision-128k-instruct": 16}
"""The published models and their num_crops; their sizes are the defaults of Phi3VConfig."""
SMALL = dict.fromkeys((str(easy_vqa.MODEL), tiny.MODEL), easy_vqa.NUM_CROPS)
"""Models that a recipe creates when it first runs."""


class Known(NamedTuple):
    """The size of a recipe's data set. Tokens of texts are counted on the recipe's prompt and a typical answer."""

    pages: int
    examples: int
    images: int
    """Images per page."""
    size: tuple[int, int]
    """(width, height) of an image in pixels."""
    before: int
    """Tokens before and between the images."""
    after: int
    """Tokens of a question and its answer."""
    num_targets: int
    source: str


KNOWN = {
    "easy-vqa": Known(4000, 38575, 1, (64, 64), 4, 22, 4, "as published"),
    "docvqa": Known(1000, 1000, 1, (1275, 1650), 4, 31, 11, "the mini set; pages assumed to be letter-sized"),
    "docvqa-full": Known(10194, 39463, 1, (1275, 1650), 4, 31, 11, "as published; pages assumed to be letter-sized"),
    "hateful-memes": Known(8000, 8000, 1, (800, 600), 4, 27, 6, "images assumed to be 4:3"),
    "nlvr2": Known(49900, 49900, 2, (1024, 768), 5, 61, 6, "about as many pairs; images assumed to be 4:3"),
    "ucf101": Known(300, 300, 8, (320, 240), 11, 72, 8, "the subset of ten classes, eight frames a video"),
}


def known_lengths(known: Known, num_crops: int) -> Lengths:
    """The lengths of a data set of equal images, whose pages have equally many questions."""
    h, w = hd_size(*known.size, num_crops)
    prefix = known.before + known.images * num_image_tokens(h, w)
    all_equal = functools.partial(np.full, known.examples, dtype=np.int64)
    return Lengths(
        page=np.arange(known.examples, dtype=np.int64) * known.pages // known.examples,
        tokens=all_equal(prefix + known.after),
        prefix=all_equal(prefix),
        crops=all_equal(known.images * (num_tiles(h, w) + 1)),
        num_targets=all_equal(known.num_targets),
    )


LETTERS_PER_TOKEN = 4


class EstimatingProcessor:
    """Replaces a processor whose tokenizer is not on this machine: a text has one token per four letters."""

    image_token_id, bos_token_id, end_of_text_id, text_id = range(4)

    def __init__(self, num_crops: int) -> None:
        self.num_crops = num_crops

    def token_ids(self, text: str) -> list[int]:
        lengths = [math.ceil(len(chunk) / LETTERS_PER_TOKEN) for chunk in IMAGE_TAG.split(text)[::2]]
        image = [self.image_token_id, self.bos_token_id]
        return [id for length in lengths for id in (*image, *[self.text_id] * length)][len(image) :]


@dataclass(frozen=True, kw_only=True)
class Work:
    """The data and the model of a plan."""

    lengths: Lengths
    config: Phi3VConfig
    num_crops: int
    source: str
    """Where the lengths come from, in words."""


def find_work(
    recipe: ModuleType | None, base: Run, name: str, num_crops: int | None, train: Path | None, image_root: Path | None
) -> Work:
    """Measure `train`, or look up the recipe's data set under `name`. Raises InputError for unreadable files."""
    model, num_crops = base.base.model, num_crops or base.base.num_crops
    if train is None:
        if (known := KNOWN.get(name)) is None:
            raise InputError(f"{name} has no data set: give your own data with --train")
        num_crops = num_crops or easy_vqa.NUM_CROPS
        lengths, source = known_lengths(known, num_crops), known.source
    else:
        processor = find_processor(model, num_crops)
        sizes = functools.lru_cache(NAMES_KEPT)(read_size)  # a page has many questions
        lengths = Lengths.of(encode(example, processor, sizes) for example in iter_jsonl(train, image_root))
        num_crops, source = processor.num_crops, "every image and text measured"
        if isinstance(processor, EstimatingProcessor):
            source = f"every image measured; texts at {LETTERS_PER_TOKEN} letters a token: the tokenizer is not here"
    return Work(lengths=lengths, config=find_config(model), num_crops=num_crops, source=source)


def find_config(model: str) -> Phi3VConfig:
    """The configuration of a model. Those of the published models and of the recipes' small model are known."""
    if not Path(model).is_dir() and model in PUBLISHED:
        return Phi3VConfig()
    if not Path(model).is_dir() and model in SMALL:
        return Phi3VConfig(**easy_vqa.DECODER, vision_config=easy_vqa.CLIP, vocab_size=448)
    return load_config(model)


def find_processor(model: str, num_crops: int | None) -> Any:
    """The processor of a model on this machine, without downloading it; else an EstimatingProcessor."""
    try:
        return Phi3VProcessor.from_pretrained(model, num_crops=num_crops, local_files_only=True)
    except InputError:
        if Path(model).is_dir():
            raise
        return EstimatingProcessor(num_crops or (PUBLISHED | SMALL).get(model, 4))
