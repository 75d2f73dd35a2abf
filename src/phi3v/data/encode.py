"""From a conversation to token ids and their loss mask: the one encode path of training, evaluation and chat.

The text of a conversation is the chat template's, `<|user|>\\n...<|end|>\\n<|assistant|>\\n...<|end|>\\n` turn by turn,
after `<|system|>\\n...<|end|>\\n` if there is a system text, with `<s>` in front and `<|endoftext|>` once at the very
end, or in every turn with `closed_turns`. An image is one `<|image|>` id here, followed by another `<s>`; `expand`
repeats it once per vector of the image. A prompt for generation has exactly the ids that precede its answer in
training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from phi3v.base.errors import InputError
from phi3v.data.image import hd_size, num_image_tokens, num_tiles
from phi3v.data.processor import IMAGE_TAG, Phi3VProcessor, check_tags, check_text, expand, tag_numbers

__all__ = ["Encoded", "Example", "Turn", "encode", "expand", "messages", "prompt_text", "questions"]


Sizes = Callable[[str], tuple[int, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One exchange: what the user says, with the images (absolute paths) shown in it, and the answer.

    `assistant` is None only in the last turn of a prompt. Without `loss` the answer is read, but not learned or scored.
    """

    user: str
    assistant: str | None = None
    images: tuple[str, ...] = ()
    loss: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One conversation. `where` is its origin, "train.jsonl:41"; `answers` are the last turn's accepted answers.

    `group` names the examples that count as right only together. With `closed_turns` every turn begins with `<s>` and
    ends with `<|endoftext|>`, as in the original recipe for NLVR2.
    """

    id: str
    turns: tuple[Turn, ...]
    system: str = ""
    source: str = ""
    where: str = ""
    answers: tuple[str, ...] = ()
    group: str = ""
    closed_turns: bool = False

    def __post_init__(self) -> None:
        last = self.turns[-1].assistant
        if not self.answers and last is not None:
            object.__setattr__(self, "answers", (last,))

    @property
    def images(self) -> tuple[str, ...]:
        return tuple(image for turn in self.turns for image in turn.images)


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A conversation as token ids, one id per image.

    ids          int32 [n], each image one `<|image|>` id (`expand` makes the model's input)
    loss_mask    bool [n], whether a token carries loss; all False in a prompt for generation
    prefix       ids[:prefix] ends with the last image; 0 without images, or with a target token before the last
    images       paths, in order of appearance; image_sizes their padded (h, w) in pixels
    """

    ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    prefix: int
    images: tuple[str, ...]
    image_sizes: tuple[tuple[int, int], ...]
    id: str
    where: str

    @property
    def tokens(self) -> int:
        """Length of the sequence with expanded images."""
        return len(self.ids) + self._image_tokens

    @property
    def prefix_tokens(self) -> int:
        """Length of the expanded prefix."""
        return self.prefix + self._image_tokens if self.prefix else 0

    @property
    def crops(self) -> int:
        """Number of crops for the vision tower: the tiles and a global view of each image."""
        return sum(num_tiles(h, w) + 1 for h, w in self.image_sizes)

    @property
    def num_targets(self) -> int:
        return int(self.loss_mask.sum())

    @property
    def _image_tokens(self) -> int:
        return sum(num_image_tokens(h, w) - 1 for h, w in self.image_sizes)


def encode(example: Example, processor: Phi3VProcessor, sizes: Sizes | None = None) -> Encoded:
    """Token ids and loss mask of a conversation.

    `sizes` gives the (width, height) of an image file as the model sees it. Default: read from the file.

    The targets of every turn with loss are the answer, `<|end|>` and its newline, and `<|endoftext|>` at the end of the
    conversation (of every turn, with `closed_turns`). If the last turn lacks its answer, it is a prompt for generation
    and no token carries loss. White space at the start of an answer has no tokens, because `<|assistant|>` swallows it.
    Raises InputError, naming the example, if tags and images do not match, a text holds `<|image|>`, or an image cannot
    be read.
    """
    images = example.images
    ids = [processor.bos_token_id]
    answers: list[tuple[int, int]] = []
    try:
        for message in messages(example):
            piece = processor.token_ids(_text(message))
            if message["role"] == "assistant":
                answers.append((len(ids) + 1, len(ids) + len(piece)))
            elif answers and example.closed_turns:
                ids += [processor.end_of_text_id, processor.bos_token_id]
                answers[-1] = (answers[-1][0], len(ids) - 1)
            ids += piece
        image_sizes = tuple(hd_size(*(sizes or processor.read_size)(image), processor.num_crops) for image in images)
    except InputError as error:
        raise InputError(f"{example.where}: {error}") from error
    if example.turns[-1].assistant is None:
        ids += processor.token_ids("<|assistant|>\n")
        answers = []
    else:
        ids.append(processor.end_of_text_id)
        answers[-1] = (answers[-1][0], len(ids))
    array = np.array(ids, dtype=np.int32)
    loss_mask = np.zeros(len(ids), dtype=np.bool_)
    for turn, (start, end) in zip(example.turns, answers, strict=False):  # a prompt has no answers
        loss_mask[start:end] = turn.loss
    places = np.flatnonzero(array == processor.image_token_id)
    prefix = int(places[-1]) + 1 if len(places) else 0
    return Encoded(
        ids=array,
        loss_mask=loss_mask,
        prefix=0 if loss_mask[:prefix].any() else prefix,
        images=images,
        image_sizes=image_sizes,
        id=example.id,
        where=example.where,
    )


def questions(example: Example) -> list[Example]:
    """One prompt for generation per answered turn with loss, after the turns before it, with its accepted answers."""
    turns = example.turns
    asked = [k for k, turn in enumerate(turns) if turn.loss and turn.assistant is not None]
    return [
        replace(
            example,
            id=example.id if len(asked) == 1 else f"{example.id}#{k + 1}",
            turns=(*turns[:k], replace(turns[k], assistant=None)),
            answers=example.answers if k == len(turns) - 1 else (turns[k].assistant or "",),
        )
        for k in asked
    ]


def prompt_text(example: Example) -> str:
    """The text of a prompt, with its images as tags: what `encode` tokenizes."""
    return "".join(map(_text, messages(example))) + "<|assistant|>\n"


def _text(message: Mapping[str, str]) -> str:
    return f"<|{message['role']}|>\n{message['content']}<|end|>\n"


def messages(example: Example) -> list[dict[str, str]]:
    """The conversation as messages for a chat template, images as tags numbered through the whole conversation.

    Tags in the data may count within their turn or continue from the turns before; a turn without tags gets its images
    in front. A turn without an answer has no assistant message. Raises InputError if tags and images of a turn do not
    match.
    """
    result, earlier = [], 0
    if example.system:
        result.append({"role": "system", "content": without_images(example.system, "a system text")})
    for turn in example.turns:
        result.append({"role": "user", "content": user_text(turn, earlier)})
        earlier += len(turn.images)
        if turn.assistant is not None:
            result.append({"role": "assistant", "content": without_images(turn.assistant, "an answer")})
    return result


def user_text(turn: Turn, earlier: int) -> str:
    """The user's text with images as tags earlier+1, earlier+2, ... Raises InputError if its own tags do not match."""
    check_text(turn.user)
    expected = range(earlier + 1, earlier + len(turn.images) + 1)
    numbers = tag_numbers(turn.user)
    if not numbers:
        tags = "".join(f"<|image_{number}|>" for number in expected)
        return f"{tags}\n{turn.user}" if tags else turn.user
    if numbers != list(expected):
        check_tags(numbers, len(turn.images))
    fresh = iter(expected)
    return IMAGE_TAG.sub(lambda _: f"<|image_{next(fresh)}|>", turn.user)


def without_images(text: str, what: str) -> str:
    """The text itself. Raises InputError, naming `what` it is, if it holds an image."""
    check_text(text)
    if IMAGE_TAG.search(text):
        raise InputError(f"{what} cannot hold an image tag")
    return text
