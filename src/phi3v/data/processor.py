"""Phi3VProcessor: text and images to what the model reads, and back.

A plain class over a fast tokenizer and `phi3v.data.image`. Image positions carry the real id of `<|image|>`, as often
as the picture has vectors; the text names images by the tags `<|image_1|>`, `<|image_2|>`, ... in ascending order. As
published, the text is cut at its tags and every piece is tokenised on its own after a `<s>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from phi3v.data.image import MEAN, STD, hd_transform, load_image, num_image_tokens, pixel_values
from phi3v.errors import InputError

IMAGE_TAG = re.compile(r"<\|image_(\d+)\|>")
IMAGE_TOKEN = "<|image|>"


def check_tags(numbers: Sequence[int], num_images: int) -> None:
    """Raises InputError, with both counts, unless the tags' numbers are 1, 2, ..., `num_images`."""
    if list(numbers) != list(range(1, num_images + 1)):
        found = f" ({', '.join(map(str, numbers))})" if numbers else ""
        raise InputError(
            f"prompt has {len(numbers)} image tags{found}, {num_images} images were given; "
            f"tags count 1, 2, ... up to the number of images, each once and in this order"
        )


class Phi3VProcessor:
    """Tokenizer and HD transform of one checkpoint. Raises InputError when the tokenizer lacks a special token."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, num_crops: int = 4) -> None:
        if num_crops < 1:
            raise InputError(f"num_crops is {num_crops}, at least 1 is needed")
        self.tokenizer = tokenizer
        self.num_crops = num_crops
        self.bos_token_id = self._special_id("<s>")
        self.image_token_id = self._special_id(IMAGE_TOKEN)
        self.end_of_text_id = self._special_id("<|endoftext|>")
        self.pad_token_id = self.end_of_text_id
        self.stop_token_ids = (self._special_id("<|end|>"), self.end_of_text_id)

    def _special_id(self, token: str) -> int:
        number = self.tokenizer.get_vocab().get(token)
        if number is None:
            raise InputError(f"tokenizer {self.tokenizer.name_or_path} has no {token}: not a Phi-3-vision tokenizer")
        return number

    def token_ids(self, text: str) -> list[int]:
        """Ids of a text: one image id and a `<s>` for each tag, none in front; tags are not checked against anything.

        Cutting a text before a special token and joining the ids of the parts gives the same ids.
        """
        if IMAGE_TOKEN in text:
            raise InputError(f"the text holds a literal {IMAGE_TOKEN}; write <|image_1|>, <|image_2|>, ... for images")
        backend = self.tokenizer.backend_tokenizer
        if backend.truncation is not None or backend.padding is not None:  # left behind by an earlier tokenizer(...)
            backend.no_truncation()
            backend.no_padding()
        first, *rest = IMAGE_TAG.split(text)[::2]
        ids = list(backend.encode(first, add_special_tokens=False).ids)
        for chunk in rest:
            ids += [self.image_token_id, self.bos_token_id]
            ids += backend.encode(chunk, add_special_tokens=False).ids
        return ids
