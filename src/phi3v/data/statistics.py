"""What a data file is like, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from phi3v.data.image import ImageInfo


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """The distribution of one number per example."""

    mean: float
    p50: int
    p95: int
    max: int
    histogram: tuple[tuple[int, int], ...]
    """(lowest value, number of examples) of bins of equal width."""

    @classmethod
    def of(cls, numbers: ArrayLike, num_bins: int = 12) -> Statistics:
        """The statistics of one or more whole numbers."""
        values = np.asarray(numbers, dtype=np.int64)
        low, high = int(values.min()), int(values.max())
        width = -(-(high - low + 1) // num_bins)
        counts = np.bincount((values - low) // width).tolist()
        p50, p95 = np.percentile(values, [50, 95], method="inverted_cdf").tolist()
        histogram = tuple((low + k * width, count) for k, count in enumerate(counts))
        return cls(mean=float(values.mean()), p50=p50, p95=p95, max=high, histogram=histogram)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What `check` finds in a data file.

    Counts are of the lines that hold an example; `images` counts appearances, `image_files` files. Statistics are of
    the examples without a problem: None if there are none, and, for tokens, without a processor.
    """

    path: str
    problems: tuple[str, ...]
    """"file:line: what is wrong", in the order of the file. With any, the data is not fit for training."""
    warnings: tuple[str, ...]
    """The same for what is odd but trainable, the same text once; the last ones may be about image files."""
    num_lines: int
    """Lines that are not blank."""
    bad_lines: tuple[int, ...]
    """Those with problems, counted from 0 among the lines that are not blank."""
    odd_lines: tuple[int, ...]
    """Those with warnings, counted in the same way."""
    examples: int
    turns: int
    images: int
    image_files: int
    text_only: int
    tokens: Statistics | None
    answer_tokens: Statistics | None
    crops: Statistics | None
    example_keys: bytes = b""
    """64 bits for each example without a problem, which stand for its texts and the content of its images."""
    files: Mapping[str, ImageInfo] = field(default_factory=dict)
    """The readable images by path, and below the fingerprints of all (`data.stamp`)."""
    fingerprints: Mapping[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def statistics(self) -> dict[str, Statistics]:
        """The statistics that there are, by name."""
        every = {"tokens": self.tokens, "answer tokens": self.answer_tokens, "crops": self.crops}
        return {name: one for name, one in every.items() if one is not None}
