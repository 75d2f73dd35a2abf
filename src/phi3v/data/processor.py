"""Phi3VProcessor: text and images to the model's inputs, and back.

A plain class over a fast tokenizer and `phi3v.data.image`. Image positions carry the id of `<|image|>`, once per vector
of the image; the text names images by the tags `<|image_1|>`, `<|image_2|>`, ... in ascending order. As published, the
text is cut at its tags and every piece is tokenized on its own after a `<s>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from huggingface_hub import snapshot_download
from numpy.typing import NDArray
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerFast

from phi3v.base import jsonfile
from phi3v.base.config import Colors, Orientation
from phi3v.base.errors import InputError
from phi3v.data.image import MEAN, STD, ImageRules, hd_transform, load_image, num_image_tokens, pixel_values, read_size
from phi3v.data.tokenizer import named_errors, read_tokenizer

ImageSource = Image.Image | str | Path

IMAGE_TAG = re.compile(r"<\|image_(\d+)\|>")
IMAGE_TOKEN = "<|image|>"

CLASS = "processing_phi3_v.Phi3VProcessor"  # in the published remote code, which readers of our files may still use
PROCESSOR_CONFIG = {"auto_map": {"AutoProcessor": CLASS}, "processor_class": "Phi3VProcessor"}
PREPROCESSOR_CONFIG = {
    "auto_map": {"AutoImageProcessor": "processing_phi3_v.Phi3VImageProcessor", "AutoProcessor": CLASS},
    "do_convert_rgb": True,
    "image_mean": list(MEAN),
    "image_processor_type": "Phi3VImageProcessor",
    "image_std": list(STD),
    "num_crops": 4,
    "num_img_tokens": 144,
    "processor_class": "Phi3VProcessor",
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
)
REMOTE_CODE = "processing_phi3_v.py"  # copied for other readers, never run
FILES = (*TOKENIZER_FILES, "preprocessor_config.json", "processor_config.json", REMOTE_CODE)

UNSAID = ImageRules()  # in preprocessor_config.json, as published

MAX_CROPS = 1024
"""More do not fit in a context: 1,000 crops are 144,000 tokens."""


def check_tags(numbers: Sequence[int], num_images: int) -> None:
    """Raises InputError, with both counts, unless the tags' numbers are 1, 2, ..., `num_images`."""
    if list(numbers) != list(range(1, num_images + 1)):
        found = f" ({', '.join(map(str, numbers))})" if numbers else ""
        raise InputError(
            f"prompt has {len(numbers)} image tags{found}, {num_images} images were given: "
            "each image needs its tag <|image_1|>, <|image_2|>, ... once and in this order"
        )


def tag_numbers(text: str) -> list[int]:
    """The numbers of a text's image tags, in order; 10^9 for all larger ones, since Python reads only 4,300 digits."""
    return [int(digits) if len(digits) < 10 else 10**9 for digits in IMAGE_TAG.findall(text)]


def check_text(text: str) -> None:
    """Raises InputError if the text holds the token that stands for an image's vectors."""
    if IMAGE_TOKEN in text:
        raise InputError(f"the text holds a literal {IMAGE_TOKEN}: write <|image_1|>, <|image_2|>, ... for images")


def expand(ids: Sequence[int] | NDArray[np.int32], image_token_id: int, counts: Sequence[int]) -> NDArray[np.int32]:
    """The model's input ids: the k-th image id repeated counts[k] times."""
    array = np.asarray(ids, dtype=np.int32)
    repeats = np.ones(len(array), dtype=np.int64)
    repeats[array == image_token_id] = counts
    return np.repeat(array, repeats)


class Phi3VProcessor:
    """Tokenizer and HD transform of a checkpoint. Raises InputError if the tokenizer lacks a special token."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, num_crops: int = 4, rules: ImageRules = UNSAID) -> None:
        if not isinstance(num_crops, int) or not 1 <= num_crops <= MAX_CROPS:
            raise InputError(f"num_crops is {num_crops!r}, it must be a whole number from 1 to {MAX_CROPS}")
        self.tokenizer = tokenizer
        self.num_crops = num_crops
        self.rules = rules
        self.bos_token_id = self._special_id("<s>")
        self.image_token_id = self._special_id(IMAGE_TOKEN)
        self.end_of_text_id = self._special_id("<|endoftext|>")
        self.pad_token_id = self.end_of_text_id
        self.stop_token_ids = (self._special_id("<|end|>"), self.end_of_text_id)
        self._files: dict[str, bytes] = {}
        self._loaded: tuple[int, str | None] | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        num_crops: int | None = None,
        exif_orientation: Orientation | None = None,
        image_colors: Colors | None = None,
        **hub: Any,
    ) -> Phi3VProcessor:
        """The processor of a model folder, or of a model on the Hub (`hub`: revision, cache_dir, token, ...).

        `num_crops` replaces the checkpoint's own (4 for Phi-3.5-vision, 16 for Phi-3-vision), and so do the rules for
        images. No code of the checkpoint is run. Raises InputError, naming the file, if something is missing or
        unreadable.
        """
        for word in ("trust_remote_code", "_from_auto"):  # from AutoProcessor
            hub.pop(word, None)
        folder = _folder(name, hub)
        files = {path.name: jsonfile.read_bytes(path) for file in FILES if (path := folder / file).is_file()}
        if "tokenizer.json" not in files:
            raise InputError(f"{name}: no tokenizer.json, so this is not a model folder")
        place = f"{name}/preprocessor_config.json"
        settings = jsonfile.parse_object(files.get("preprocessor_config.json", b"{}"), place)
        given = {"exif_orientation": exif_orientation, "image_colors": image_colors}
        rules = jsonfile.convert(settings | {key: rule for key, rule in given.items() if rule}, ImageRules, place)
        tokenizer = read_tokenizer(files, str(name))
        processor = cls(tokenizer, num_crops if num_crops is not None else settings.get("num_crops", 4), rules)
        processor._files = files
        processor._loaded = processor._tokenizer_state()
        return processor

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the published files: those that were loaded, byte for byte, and preprocessor_config.json.

        A tokenizer that was not loaded by `from_pretrained`, or was changed since, is written by transformers.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = json.loads(self._files.get("preprocessor_config.json", b"null")) or PREPROCESSOR_CONFIG
        files = {"processor_config.json": _json(PROCESSOR_CONFIG), **self._files}
        # The published files have no rules, and those of a model that follows the published ones stay without.
        rules = {key: rule for key, rule in vars(self.rules).items() if key in settings or rule != vars(UNSAID)[key]}
        files["preprocessor_config.json"] = _json({**settings, "num_crops": self.num_crops, **rules})
        if self._loaded != self._tokenizer_state():
            files = {file: content for file, content in files.items() if file not in TOKENIZER_FILES}
            self.tokenizer.save_pretrained(folder)
        for file, content in files.items():
            (folder / file).write_bytes(content)

    def read_size(self, path: str | Path) -> tuple[int, int]:
        """(width, height) of an image file as the model sees it."""
        return read_size(path, self.rules)

    def token_ids(self, text: str) -> list[int]:
        """Ids of a text: one image id and a `<s>` for each tag, no `<s>` in front. The tags' numbers do not matter.

        Tokenizing the text in parts, cut before special tokens, gives the same ids, because no special token of this
        tokenizer swallows what precedes it.
        """
        check_text(text)
        backend = self.tokenizer.backend_tokenizer
        if backend.truncation is not None or backend.padding is not None:  # set by an earlier tokenizer(...)
            backend.no_truncation()
            backend.no_padding()
        first, *rest = IMAGE_TAG.split(text)[::2]
        with named_errors("the tokenizer cannot read a text"):
            ids = backend.encode(first, add_special_tokens=False).ids
            for chunk in rest:
                ids += [self.image_token_id, self.bos_token_id]
                ids += backend.encode(chunk, add_special_tokens=False).ids
        return ids

    def __call__(
        self,
        text: str | Sequence[str],
        images: ImageSource | Sequence[Any] | None = None,
        *,
        return_tensors: str | None = "pt",
        padding: bool | str = False,
        padding_side: str | None = None,
    ) -> BatchFeature:
        """The model's inputs for one prompt or a batch of B.

        images: for one prompt an image or a list of images; for a batch one such entry (or None) per prompt. An image
        is a Pillow image or a path. Returns input_ids and attention_mask [B, L], int64 (lists without
        `return_tensors`), and, if there are n > 0 images in all, pixel_values float32 [n, num_crops+1, 3, 336, 336] and
        image_sizes int64 [n, 2]. Raises InputError if the tags of a prompt are not 1, 2, ..., number of its images.
        """
        texts = [text] if isinstance(text, str) else list(text)
        every: Any = [None] * len(texts) if images is None else images
        groups = [images] if isinstance(text, str) else list(every)
        if len(groups) != len(texts):
            raise InputError(f"{len(texts)} prompts, {len(groups)} lists of images were given: one for each prompt")
        rows, every_hd = [], []
        for prompt, group in zip(texts, groups, strict=True):
            shown = [] if group is None else [group] if isinstance(group, ImageSource) else list(group)
            check_tags(tag_numbers(prompt), len(shown))
            hd = [hd_transform(load_image(image, self.rules), self.num_crops) for image in shown]
            counts = [num_image_tokens(*image.shape[:2]) for image in hd]
            ids = expand([self.bos_token_id, *self.token_ids(prompt)], self.image_token_id, counts)
            rows.append(ids.tolist())
            every_hd += hd
        data = self.tokenizer.pad(
            {"input_ids": rows},
            padding=padding,
            padding_side=padding_side,
            return_attention_mask=True,
            return_tensors=return_tensors,
        )
        if every_hd:
            data["pixel_values"], data["image_sizes"] = pixel_values(every_hd, self.num_crops)
        return BatchFeature(data)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        images: ImageSource | Sequence[Any] | None = None,
        return_dict: bool = True,
        **call: Any,
    ) -> Any:
        """The text of a conversation (or of each of a list), or, with `tokenize`, the model's inputs for it.

        A message is {"role", "content"}; its content is a text with tags, or a list of {"type": "text", "text": ...}
        and {"type": "image"} items, the latter optionally with "image" (Pillow) or "path". Image items become tags,
        numbered through the conversation, with a newline between images and the text that follows.
        """
        batched = bool(conversation) and not isinstance(conversation[0], Mapping)
        texts: list[str] = []
        found: list[list[ImageSource]] = []
        for messages in conversation if batched else [conversation]:
            messages, given = _with_tags(messages)
            found.append(given)
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
            texts.append(cast(str, text))
        if not tokenize:
            return texts if batched else texts[0]
        if any(found):
            images = found if batched else found[0]
        batch = self(texts if batched else texts[0], images, **call)
        return batch if return_dict else batch["input_ids"]

    def decode(self, ids: Any, **options: Any) -> str:
        """The text of one sequence of ids; options are the tokenizer's (skip_special_tokens, ...)."""
        return cast(str, self.tokenizer.decode(ids, **options))

    def batch_decode(self, ids: Any, **options: Any) -> list[str]:
        """The texts of several sequences of ids."""
        return self.tokenizer.batch_decode(ids, **options)

    def _special_id(self, token: str) -> int:
        number = self.tokenizer.backend_tokenizer.token_to_id(token)
        if number is None:
            name = self.tokenizer.name_or_path or "tokenizer"
            raise InputError(f"{name}: no token {token}, so this is not a tokenizer of Phi-3-vision")
        return number

    def _tokenizer_state(self) -> tuple[int, str | None]:
        """What a user may change in a loaded tokenizer: its size and its template."""
        return len(self.tokenizer), self.tokenizer.chat_template


def seeing(
    model: str | None, num_crops: int | None, exif_orientation: Orientation | None, image_colors: Colors | None
) -> tuple[Phi3VProcessor | None, int, ImageRules]:
    """The processor of a model, and how it sees images; without a model as the published one does."""
    if model:
        processor = Phi3VProcessor.from_pretrained(model, num_crops, exif_orientation, image_colors)
        return processor, processor.num_crops, processor.rules
    rules = ImageRules(exif_orientation=exif_orientation or "ignore", image_colors=image_colors or "published")
    return None, num_crops or 4, rules


def _with_tags(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[ImageSource]]:
    """Messages with plain texts as contents, image items turned into tags; and the images of the items."""
    plain: list[dict[str, Any]] = []
    images: list[ImageSource] = []
    number = 0
    for message in messages:
        content = message["content"]
        text, after_image = "", False
        for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if item["type"] == "image":
                number += 1
                text += f"<|image_{number}|>"
                images += [item[key] for key in ("image", "path") if key in item]
            elif item["type"] == "text":
                text += "\n" + item["text"] if after_image and not item["text"].startswith("\n") else item["text"]
                number += len(IMAGE_TAG.findall(item["text"]))
            else:
                raise InputError(f"a message holds an item of type {item['type']!r}: only text and image are known")
            after_image = item["type"] == "image"
        plain.append({**message, "content": text})
    return plain, images


def _folder(name: str | Path, hub: Mapping[str, Any]) -> Path:
    """The folder of that name, else the local copy of the Hub model of that name, downloaded if need be."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_absolute() or str(name).count("/") != 1:  # on the Hub it would be owner/name
        raise InputError(f"{name}: no such model folder")
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(FILES), **hub))
    except (OSError, ValueError) as error:  # no such model, no access, no network; no possible name of a model
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{name}: no such model folder, and no model on the Hub could be read ({reason})") from error


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
