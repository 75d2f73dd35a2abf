"""Fabricated examples: any shape of conversation, without a tokenizer."""

from collections.abc import Callable

import numpy as np
import pytest

from phi3v.data.encode import Encoded
from phi3v.data.image import hd_size, read_size

IMAGE = 32044
NUM_CROPS = 4


def fabricate(*pieces: int | str, id: str = "x", seed: int = 0) -> Encoded:
    """An example from its pieces: n > 0 is n tokens of text, n < 0 that many target tokens, a string an image file.

    Up to the last image the tokens count up from 100, so that examples with the same images and the same number of
    tokens share a page; after it they depend on `seed`.
    """
    ids: list[int] = []
    loss_mask: list[bool] = []
    images: list[str] = []
    prefix = 0
    for piece in pieces:
        if isinstance(piece, str):
            ids.append(IMAGE)
            loss_mask.append(False)
            images.append(piece)
            prefix = len(ids)
        else:
            ids += range(100 + len(ids), 100 + len(ids) + abs(piece))
            loss_mask += [piece < 0] * abs(piece)
    tail = np.random.default_rng(seed).integers(1, 30000, len(ids) - prefix)
    return Encoded(
        ids=np.array([*ids[:prefix], *tail], dtype=np.int32),
        loss_mask=np.array(loss_mask, dtype=np.bool_),
        prefix=0 if any(loss_mask[:prefix]) else prefix,
        images=tuple(images),
        image_sizes=tuple(hd_size(*read_size(image), NUM_CROPS) for image in images),
        id=id,
        where=f"train.jsonl:{id}",
    )


@pytest.fixture(scope="session", name="fabricate")
def _fabricate() -> Callable[..., Encoded]:
    return fabricate
