"""How other models' data says where an image is: tags in a text, paths inside a text, keys of a record."""

from __future__ import annotations

import re
from typing import Any

PLACE = re.compile(
    r"""
      <img>\s*(?P<inside>[^<>\n]{1,999}?)\s*</img>                    # Qwen-VL: the path between tags
    | <img\s[^>]*?src\s*=\s*["']?(?P<src>[^"'>\s]+)[^>]*>               # HTML
    | !\[[^\]\n]*\]\((?P<link>[^)\s]+)[^)\n]*\)                         # Markdown
    | <\|vision_start\|>\s*(?P<vision>[^<>\s][^<>\n]{0,999}?)\s*<\|vision_end\|>
    | \(<image>\./</image>\)                                            # MiniCPM
    | <image>\s*(?P<image>[^<>\n]{1,999}?)\s*</image>
    | \{<image>\s*(?P<braces>[^<>{}\n]{1,999}?)\s*\}
    | <\|vision_start\|>(?:<\|image_pad\|>)*(?:<\|vision_end\|>)?       # Qwen2-VL and later
    | <\|image_pad\|>
    | <img>(?:<IMG_CONTEXT>|<image>)*</img> | <IMG_CONTEXT> | <img>    # InternVL
    | <start_of_image>                                                  # Gemma
    | \[IMG\]                                                           # Pixtral
    | <\|?image[_ ]?(?P<number>\d{1,4})\|?>                             # Phi, MiniCPM
    | (?:<\|endofchunk\|>)?<\|?image[_ ]?(?:placeholder|token|soft_token|here)?\|?>
    """,
    re.VERBOSE | re.IGNORECASE,
)
"""A place for an image in a text. A named group other than `number` holds the path of the image itself."""

UNCONVERTED = re.compile(r"<(?:video|audio|bbox|ref-object)>|<\|(?:video|audio)_pad\|>")
"""Placeholders for what is not an image."""

SUFFIX = re.compile(r"[^\n]*\.(?:jpe?g|png|webp|bmp|gif|tiff?|ppm|avif)", re.IGNORECASE)
KEY = re.compile(r"(?:image|img|picture|photo|pic)s?(?:path|file|url|name|data|byte|base64)?s?\d*")


def is_image_key(key: str) -> bool:
    """Whether a key is one that data uses for images: image, imgs, image_path, Image, image2, ..."""
    return KEY.fullmatch(re.sub(r"[^a-z0-9]", "", key.lower())) is not None


def names_image(value: Any) -> bool:
    """Whether a value is the name of an image file, or begins with one."""
    if isinstance(value, list | tuple) and value:
        return names_image(value[0])
    return isinstance(value, str) and SUFFIX.fullmatch(value.partition("?")[0]) is not None
