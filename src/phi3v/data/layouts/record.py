"""A record of whatever layout as a line of our jsonl: the turns of a conversation, or a question and its answer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice, pairwise
from typing import Any, NamedTuple

from phi3v.base import jsonfile
from phi3v.base.errors import InputError
from phi3v.data.layouts.source import EMPTY, Source, of_kind, take
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


class Tag(NamedTuple):
    """A place for an image that is listed elsewhere, with the number that the tag may have."""

    number: int | None = None


class Message(NamedTuple):
    """What somebody says, with an image or a Tag for every TAG of the text."""

    role: str
    text: str
    places: list[Any]
    loss: bool


def line_of(value: Any, source: Source) -> dict[str, Any]:
    """The line, perhaps without an id, that a record becomes.

    A record has `conversations` or `messages`, a list of {"from" or "role", "value" or "content"}, or a question and an
    answer. A content is a text, or a list of parts {"type": "text", "text"} and {"type": "image"}. Images are named in
    their parts, inside the texts, in the message, or in the record, in the order of the parts and tags that need one.
    Raises InputError for what cannot be converted, and for keys that change the meaning and have no place in a line.
    """
    record = of_kind(value, dict, "a record")
    left = {source.columns.get(key, key): item for key, item in record.items() if item not in EMPTY}
    id, system = take(left, "id", "question_id", "questionid"), take(left, "system", "system_prompt")
    listed = _images(left)
    if (said := take(left, *CONVERSATION)) is None:
        said, answers = _asked(left, source)
    else:
        answers = _texts(take(left, "answers"))
    messages = [_message(one, source) for one in _one_by_one(of_kind(said, list, "conversations"))]
    systems = [] if system is None else [of_kind(system, str, "system")]
    while messages and messages[0].role == "system":
        systems.append(messages.pop(0).text)
    turns = _turns(messages, listed, source)
    shown = [*listed, *(image for turn in turns for image in turn["images"])]
    lines = [line for turn in turns for line in turn["user"].splitlines()]
    if not shown and (path := next(filter(names_image, lines), None)):
        raise InputError(f"the text has a line {path!r}, and no image is shown")
    source.account(left, shown=shown)
    line = {"system": "\n".join(systems), "conversations": turns, "answers": answers}
    return line if id is None else {"id": str(id), **line}


def _images(left: dict[str, Any]) -> list[Any]:
    """Take the images of a record, a message or a part: those of its first key for images, or of image1, image2, ..."""
    keys = sorted((key for key in left if is_image_key(key)), key=lambda key: (key != "images", key != "image", key))
    keys = keys if all(key[-1].isdigit() for key in keys) else keys[:1]
    keys = keys or [key for key in left if key.lower() in FILE and names_image(left[key])][:1]
    return [image for key in keys for image in _listed(left.pop(key))]


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str) and re.fullmatch(r'\[".*"\]', value):  # in a table
        value = jsonfile.parse(value.encode())
    if isinstance(value, dict) and all(map(PLACE.fullmatch, value)):  # MiniCPM's {"<image_00>": path, ...}
        return list(value.values())
    return list(value) if isinstance(value, list) else [value]


def _asked(left: dict[str, Any], source: Source) -> tuple[list[Any], list[str]]:
    """The messages of a question and its answer, after their history, and the accepted answers."""
    question, answers = take(left, *QUESTION), _texts(take(left, *ANSWER))
    answers += _texts(take(left, "answers"))
    if not answers and (answers := _texts(take(left, *CAPTION))) and question is None:
        question = source.ask(DESCRIBE)
    asked = [source.ask(None) if question is None else question, take(left, "input")]
    history = of_kind(take(left, "history") or [], list, "history")
    messages = [dict(zip(("user", "assistant"), of_kind(pair, list, "history"), strict=False)) for pair in history]
    messages.append({"role": "user", "content": "\n".join(_texts(asked))})
    if answers:
        messages.append({"role": "assistant", "content": Counter(answers).most_common(1)[0][0]})
    return messages, list(dict.fromkeys(answers))


def _texts(value: Any) -> list[str]:
    """The texts of one or several values; VQAv2 has answers in objects."""
    found = (
        one.get("answer") if isinstance(one, dict) else one for one in (value if isinstance(value, list) else [value])
    )
    return [str(of_kind(one, (str, int, float), "a question or an answer")) for one in found if one not in EMPTY]


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
    left = dict(of_kind(value, dict, "a message"))
    role = of_kind(take(left, "from", "role"), str, "from or role")
    role = ROLES.get(role.lower(), role)
    content = of_kind(take(left, "value", "content"), (str, list), "value or content")
    weights = [take(left, key) for key in ("loss", "weight", "train")]
    if (wrong := next((weight for weight in weights if weight not in (None, 0, 1)), None)) is not None:
        raise InputError(f"an answer of weight {wrong}: it is learned or not")
    text, places = "", list[Any]()

    def found(match: re.Match[str]) -> str:
        inside = match[match.lastgroup] if match.lastgroup else None
        places.append(Tag(int(inside)) if inside and match.lastgroup == "number" else inside or Tag())
        return TAG

    for part in content if isinstance(content, list) else [{"text": content}]:
        if isinstance(part, str):
            part = {"image" if names_image(part) else "text": part}
        details, shown = dict(of_kind(part, dict, "a part")), list[Any]()
        kind = details.pop("type", "text" if "text" in details else "image")
        if kind in TEXTS:
            piece = PLACE.sub(found, of_kind(details.pop("text", None) or "", str, "text"))
            text += f"\n{piece}" if piece and text.endswith(TAG) and not piece.startswith("\n") else piece
        elif kind in IMAGES:
            shown = _images(details) or [take(details, "path", "url") or Tag()]
            places += shown
            text += TAG * len(shown)
        else:
            raise InputError(f"a part of type {kind!r}: only text and image are converted")
        source.account(details, "content.", shown)
    tags = [place for place in places if isinstance(place, Tag)]
    if any(tags.count(tag) > 1 for tag in tags if tag.number is not None):
        raise InputError(f"a tag stands twice: {', '.join(str(tag.number) for tag in tags)}")
    if (own := _images(left)) and tags:
        places = _filled(places, own)
    elif own:
        text, places = f"{TAG * len(own)}\n{text}", [*own, *places]
    source.account(left, "messages.", places)
    if places and role != "user":
        raise InputError("only the user shows images")
    if role == "user" and (other := UNCONVERTED.search(text)):
        raise InputError(f"{other[0]} stands for something that is not converted")
    return Message(role, text, places, 0 not in weights)


def _filled(places: Sequence[Any], listed: Sequence[Any]) -> list[Any]:
    """The places with the listed images for tags: by number if all are different, else in order.

    Raises InputError if there are not as many, or numbers that do not count them.
    """
    images = list(listed)
    for place in places:
        if place in images:  # named in the text, and listed as well
            images.remove(place)
    numbers = [place.number for place in places if isinstance(place, Tag)]
    if len(numbers) != len(images):
        raise InputError(f"{len(numbers)} {TAG} tags, {len(images)} images")
    counted = [number for number in numbers if number is not None]
    first = min(1, *counted, 1)
    in_turns = all(number in (first, before + 1) for before, number in pairwise([first - 1, *counted]))
    if len(set(counted)) == len(numbers) and max(counted, default=0) == first + len(numbers) - 1:
        images = [images[number - first] for number in counted]
    elif not in_turns:
        raise InputError(f"tags with the numbers {', '.join(map(str, counted))}, {len(images)} images")
    rest = iter(images)
    return [next(rest) if isinstance(place, Tag) else place for place in places]


def _turns(messages: Sequence[Message], listed: Sequence[Any], source: Source) -> list[dict[str, Any]]:
    """The turns of a conversation. Without any place for an image in the texts, all come first.

    What the user says in several messages is joined. Raises InputError if the roles do not take turns.
    """
    places = [place for message in messages for place in message.places]
    images = map(source.image, _filled(places, listed) if places else listed)
    turns: list[dict[str, Any]] = []
    for message in messages:
        answered = not turns or "assistant" in turns[-1]
        if message.role == "user":
            shown = list(islice(images, len(message.places) if places else None))
            if answered:
                turns.append({"images": shown, "user": message.text})
            else:
                turns[-1] = {"images": turns[-1]["images"] + shown, "user": f"{turns[-1]['user']}\n{message.text}"}
        elif message.role == "assistant" and not answered:
            turns[-1] |= {"assistant": message.text, "loss": message.loss}
        else:
            wanted = f"user and assistant take turns, the user first (known: {', '.join(ROLES)})"
            raise InputError(f"a message of {message.role!r} out of turn: {wanted}")
    if not turns or ("assistant" not in turns[-1] and not source.reading.unanswered):
        raise InputError("the last question has no answer (--unanswered keeps it for phi3v predict)")
    return [{**turn, "user": _numbered(turn["user"])} for turn in turns]


def _numbered(text: str) -> str:
    numbers = count(1)
    return re.sub(TAG, lambda _: f"<|image_{next(numbers)}|>", text)
