"""What a plan is made for: lengths of the examples and sizes of the model, without loading or downloading either."""

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

PUBLISHED = ("microsoft/Phi-3.5-vision-instruct", "microsoft/Phi-3-vision-128k-instruct")
"""Models whose sizes are the configuration's defaults, and need not be looked up."""
SMALL = (str(easy_vqa.MODEL), tiny.MODEL)
"""Names of models that are made when their recipe first runs."""


class Known(NamedTuple):
    """What a recipe's data is like, without having it. Texts are the recipe's prompt and an answer, as tokenised."""

    pages: int
    examples: int
    images: int
    """Of a page."""
    size: tuple[int, int]
    """(width, height) of an image."""
    before: int
    """Tokens before and between the images."""
    after: int
    """Tokens of a question and its answer."""
    supervised: int
    source: str


KNOWN = {
    "easy-vqa": Known(4000, 38575, 1, (64, 64), 4, 22, 4, "as published"),
    "docvqa": Known(1000, 1000, 1, (1275, 1650), 4, 31, 11, "the mini set; pages taken for letters"),
    "docvqa-full": Known(10194, 39463, 1, (1275, 1650), 4, 31, 11, "as published; pages taken for letters"),
    "hateful-memes": Known(8000, 8000, 1, (800, 600), 4, 27, 6, "pictures taken for 4:3"),
    "nlvr2": Known(49900, 49900, 2, (1024, 768), 5, 61, 6, "about as many pairs; pictures taken for 4:3"),
    "ucf101": Known(300, 300, 8, (320, 240), 11, 72, 8, "the subset of ten classes, eight frames a video"),
}


def known_lengths(known: Known, num_crops: int) -> Lengths:
    h, w = hd_size(*known.size, num_crops)
    prefix = known.before + known.images * num_image_tokens(h, w)
    page = np.arange(known.examples, dtype=np.int64) * known.pages // known.examples  # questions, evenly
    of_all = {
        "tokens": prefix + known.after,
        "prefix": prefix,
        "crops": known.images * (num_tiles(h, w) + 1),
        "supervised": known.supervised,
    }
    return Lengths(page=page, **{name: np.full(known.examples, value) for name, value in of_all.items()})


LETTERS_PER_TOKEN = 4


class FourLetters:
    """Stands in for a processor whose tokenizer is not here: four letters are a token."""

    image_token_id, bos_token_id, end_of_text_id = 0, 1, 2

    def __init__(self, num_crops: int) -> None:
        self.num_crops = num_crops

    def token_ids(self, text: str) -> list[int]:
        first, *rest = IMAGE_TAG.split(text)[::2]
        ids = [3] * math.ceil(len(first) / LETTERS_PER_TOKEN)
        for chunk in rest:
            ids += [self.image_token_id, self.bos_token_id, *[3] * math.ceil(len(chunk) / LETTERS_PER_TOKEN)]
        return ids


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be learnt, by which model."""

    lengths: Lengths
    config: Phi3VConfig
    num_crops: int
    source: str
    """Where the lengths come from, in words."""


def find_work(
    recipe: ModuleType | None, base: Run, name: str, num_crops: int | None, train: Path | None, image_root: Path | None
) -> Work:
    """Lengths of the data and sizes of the model. Raises InputError for what cannot be read."""
    config = find_config(base.base.model)
    if train is None:
        assert recipe is not None
        if (known := KNOWN.get(name)) is None:
            raise InputError(f"{name} learns from data of your own: give it with --train")
        crops = num_crops or base.base.num_crops or easy_vqa.NUM_CROPS
        return Work(lengths=known_lengths(known, crops), config=config, num_crops=crops, source=known.source)
    processor = find_processor(base.base.model, num_crops or base.base.num_crops)
    sizes = functools.lru_cache(NAMES_KEPT)(read_size)  # a page has many questions
    lengths = Lengths.of(encode(example, processor, sizes) for example in iter_jsonl(train, image_root))
    counted = "every picture and text measured"
    if isinstance(processor, FourLetters):
        counted = f"every picture measured; texts at {LETTERS_PER_TOKEN} letters a token, as the tokenizer is not here"
    return Work(lengths=lengths, config=config, num_crops=processor.num_crops, source=counted)


def find_config(model: str) -> Phi3VConfig:
    """The sizes of a model. Those of the published ones, and of the one that two recipes make, are known."""
    if Path(model).is_dir():
        return load_config(model)
    if model in PUBLISHED:
        return Phi3VConfig()
    if model in SMALL:
        return Phi3VConfig(**easy_vqa.DECODER, vision_config=easy_vqa.CLIP, vocab_size=448)
    return load_config(model)


def find_processor(model: str, num_crops: int | None) -> Any:
    """Of a model that is here, or was once downloaded; else a stand-in."""
    if Path(model).is_dir():
        return Phi3VProcessor.from_pretrained(model, num_crops=num_crops)
    try:
        return Phi3VProcessor.from_pretrained(model, num_crops=num_crops, local_files_only=True)
    except InputError:
        return FourLetters(num_crops or (easy_vqa.NUM_CROPS if model in SMALL else 16 if model == PUBLISHED[1] else 4))
