"""A record of whatever layout as a line of our jsonl: the turns of a conversation, or a question and its answer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import msgspec

from phi3v.base import jsonfile
from phi3v.base.errors import InputError
from phi3v.data.layouts.source import EMPTY, Source, take
from phi3v.data.tags import PLACE, UNCONVERTED, is_image_key, names_image

TAG = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"}
ROLES |= {"bot": "assistant", "system": "system", "developer": "system"}
CONVERSATION = ("conversations", "messages", "conversation", "texts")
QUESTION = ("question", "query", "prompt", "instruction", "prefix", "problem", "input")
ANSWER = ("answer", "response", "output", "suffix", "completion", "target", "choice", "label", "class")
CAPTION = ("caption", "captions", "text", "description")
FILE = ("file_name", "filename", "file", "path", "media", "url")
TEXTS = ("text", "input_text", "output_text")
IMAGES = ("image", "image_url", "input_image")
DESCRIBE = "Describe the image."


@dataclass
class Message:
    """What somebody says; every TAG of the text is a place for an image."""

    role: str
    text: str
    places: list[Place]
    loss: bool


@dataclass
class Place:
    """A place for an image: its number if the tag has one, and the image if it is known."""

    number: int | None = None
    image: Any = None


def line_of(value: Any, source: Source) -> dict[str, Any]:
    """The line, perhaps without an id, that a record becomes.

    A record has `conversations` or `messages`, a list of {"from" or "role", "value" or "content"}, or a question and an
    answer. A content is a text, or a list of parts {"type": "text", "text"} and {"type": "image"}. Images are named in
    their parts, inside the texts, in the message, or in the record, in the order of the parts and tags that need one.
    Raises InputError for what cannot be converted, and for keys that change the meaning and have no place in a line.
    """
    left = {source.columns.get(key, key): item for key, item in _object(value).items() if item not in EMPTY}
    line: dict[str, Any] = {"id": str(id)} if (id := take(left, "id", "question_id", "questionid")) is not None else {}
    system = [_kind(text, str, "system") for text in [take(left, "system", "system_prompt")] if text is not None]
    listed = _images(left)
    shown = list(listed)
    if (found := take(left, *CONVERSATION)) is None:
        found, answers = _asked(left, source)
    else:
        answers = take(left, "answers") or []
    messages = [_message(one, source) for one in _one_by_one(_kind(found, list, "conversations"))]
    while messages and messages[0].role == "system":
        system.append(messages.pop(0).text)
    _place(messages, listed)
    line["conversations"] = turns = _turns(messages, listed, source)
    shown += [image for turn in turns for image in turn["images"]]
    if not shown:
        _check_for_paths(messages)
    source.account(left, shown=shown)
    return line | {"system": "\n".join(system)} | ({"answers": answers} if answers else {})


def _images(left: dict[str, Any]) -> list[Any]:
    """Take the images of a record or a message: those of its first key for images, or of image1, image2, ..."""
    keys = sorted((key for key in left if is_image_key(key)), key=lambda key: (key != "images", key != "image", key))
    if not all(key[-1].isdigit() for key in keys):
        keys = keys[:1]
    keys = keys or [key for key in left if key.lower() in FILE and names_image(left[key])][:1]
    return [image for key in keys for image in _listed(left.pop(key))]


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str) and value.startswith("["):  # in a table
        try:
            value = msgspec.json.decode(value)
        except msgspec.DecodeError:
            return [value]
    if isinstance(value, dict) and all(PLACE.fullmatch(key) for key in value):  # MiniCPM's {"<image_00>": path, ...}
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else [value]


def _asked(left: dict[str, Any], source: Source) -> tuple[list[Any], list[str]]:
    """The messages of a question and its answer, after their history, and the accepted answers."""
    question, answer = take(left, *QUESTION), take(left, *ANSWER)
    answers = [str(_kind(text, (str, int, float), "answers")) for text in _answers(take(left, "answers"))]
    caption = take(left, *CAPTION) if answer is None and not answers else None
    if question is None:
        question = source.ask(None if caption is None else DESCRIBE)
    elif (more := take(left, "input")) is not None:
        question = f"{question}\n{more}"
    if answer is None:
        answer = caption
    if isinstance(answer, list):
        answers, answer = [*map(str, answer), *answers], None
    if answer is None and answers:
        answer = Counter(answers).most_common(1)[0][0]
    messages: list[Any] = []
    for asked, answered in take(left, "history") or []:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    messages.append({"role": "user", "content": _kind(question, str, "question")})
    if answer is not None:
        messages.append({"role": "assistant", "content": str(_kind(answer, (str, int, float), "answer"))})
    return messages, list(dict.fromkeys(answers))


def _answers(value: Any) -> Iterator[Any]:
    """The texts of accepted answers, which VQAv2 has in objects."""
    for one in value if isinstance(value, list) else [] if value is None else [value]:
        yield one.get("answer") if isinstance(one, dict) else one


def _one_by_one(messages: Iterable[Any]) -> Iterator[Any]:
    """The messages, of which our own jsonl and the Cauldron have two in one object."""
    for message in messages:
        if isinstance(message, dict) and {"user", "assistant"} <= message.keys():
            asked = dict(message)
            answered = {"role": "assistant", "content": asked.pop("assistant"), "loss": asked.pop("loss", None)}
            yield from ({"role": "user", "content": asked.pop("user"), **asked}, answered)
        else:
            yield message


def _message(value: Any, source: Source) -> Message:
    left = dict(_object(value))
    role = _kind(_needed(left, "from", "role"), str, "role")
    content = _kind(_needed(left, "value", "content"), (str, list), "content")
    loss = True
    for key in ("loss", "weight", "train"):
        if (weight := take(left, key)) not in (None, 0, 1):
            raise InputError(f"{key} is {weight}: an answer is learned or not")
        loss = loss and weight in (None, 1)
    text, places = "", list[Place]()

    def found(match: re.Match[str]) -> str:
        number = match["number"]
        paths = (path for name, path in match.groupdict().items() if name != "number" and path not in (None, "./"))
        places.append(Place(int(number) if number else None, next(paths, None)))
        return TAG

    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            part = {"image" if names_image(part) and part is not content else "text": part}
        details = dict(_object(part))
        kind, shown = details.pop("type", "text" if "text" in details else "image"), list[Any]()
        if kind in TEXTS:
            piece = PLACE.sub(found, _kind(details.pop("text", None) or "", str, "text"))
            text += f"\n{piece}" if piece and text.endswith(TAG) and not piece.startswith("\n") else piece
        elif kind in IMAGES:
            shown = _images(details) or [details.pop(key) for key in ("path", "url") if details.get(key)][:1]
            places += [Place(image=image) for image in shown] or [Place()]
            text += TAG * max(1, len(shown))
        else:
            raise InputError(f"a part of type {kind!r}: only text and image are converted")
        source.account(details, "content.", shown)
    own = _images(left)
    waiting = [place for place in places if place.image is None]
    if own and not waiting:
        text, places = f"{TAG * len(own)}\n{text}", [*(Place(image=image) for image in own), *places]
    elif own and len(own) != len(waiting):
        raise InputError(f"{len(waiting)} {TAG} tags, {len(own)} images in a message")
    for place, image in zip(waiting, own, strict=False):
        place.image = image
    source.account(left, "messages.", [place.image for place in places])
    role = ROLES.get(role.lower(), role)
    if places and role != "user":
        raise InputError("only the user shows images")
    if role == "user" and (other := UNCONVERTED.search(text)):
        raise InputError(f"{other[0]} stands for something that is not converted")
    return Message(role, text, places, loss)


def _place(messages: Sequence[Message], listed: list[Any]) -> None:
    """Put the listed images into the places that wait for one, and leave those for which there is no place.

    Numbers of tags that are all different say which image is meant; otherwise they must count through every message.
    """
    places = [place for message in messages for place in message.places]
    for place in places:
        if place.image in listed:  # named in the text, and listed as well
            listed.remove(place.image)
    waiting = [place for place in places if place.image is None]
    if places and len(waiting) != len(listed):
        raise InputError(f"{len(waiting)} {TAG} tags, {len(listed)} images")
    numbers = [place.number for place in waiting if place.number is not None]
    first = min(1, *numbers, 1)
    if len(numbers) == len(waiting) == len(set(numbers)):
        if sorted(numbers) != list(range(first, first + len(numbers))):
            raise InputError(f"tags with the numbers {', '.join(map(str, numbers))}, {len(listed)} images")
        waiting.sort(key=lambda place: place.number or 0)
    else:
        for message in messages:
            own = [place.number for place in message.places if place.number is not None]
            if own != list(range(first, first + len(own))):
                raise InputError(f"tags with the numbers {', '.join(map(str, numbers))} in several messages")
    for place in waiting:
        place.image = listed.pop(0)


def _turns(messages: Sequence[Message], first: Sequence[Any], source: Source) -> list[dict[str, Any]]:
    """The turns of a conversation; the images `first`, which have no place in a text, come first.

    What the user says in several messages is joined. Raises InputError if the roles do not take turns.
    """
    turns: list[dict[str, Any]] = []
    for message in messages:
        answered = not turns or "assistant" in turns[-1]
        if message.role == "user":
            if answered:
                turns.append({"images": [] if turns else [source.image(image) for image in first], "user": ""})
            turns[-1]["images"] += [source.image(place.image) for place in message.places]
            turns[-1]["user"] += message.text if answered else f"\n{message.text}"
        elif message.role == "assistant" and not answered:
            turns[-1] |= {"assistant": message.text} | ({} if message.loss else {"loss": False})
        else:
            raise InputError(
                f"a message of {message.role!r} out of turn: user and assistant take turns, the user first"
            )
    if not turns:
        raise InputError("conversations: is empty")
    if "assistant" not in turns[-1]:
        raise InputError("the last question has no answer")
    return [{**turn, "user": _numbered(turn["user"])} for turn in turns]


def _numbered(text: str) -> str:
    numbers = count(1)
    return re.sub(TAG, lambda _: f"<|image_{next(numbers)}|>", text)


def _check_for_paths(messages: Sequence[Message]) -> None:
    """Raises InputError if what the user says, without images, has a line that is the path of one."""
    for message in messages:
        if message.role == "user" and (path := next(filter(names_image, message.text.splitlines()), None)):
            raise InputError(f"the text has a line {path!r}, and no image is shown")


def _object(value: Any) -> dict[str, Any]:
    return _kind(value, dict, "a record") if not isinstance(value, dict) else value


def _needed(left: dict[str, Any], *names: str) -> Any:
    """Take the first of these keys that is there. Raises InputError if none is."""
    for name in names:
        if name in left:
            return left.pop(name)
    raise InputError(f"{' or '.join(names)} is missing")


def _kind(value: Any, kind: type | tuple[type, ...], name: str) -> Any:
    """The value. Raises InputError if it is of another kind."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputError(f"{name} cannot be {jsonfile.KINDS.get(type(value), 'a number')}")
    return value
