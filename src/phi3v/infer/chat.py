"""A conversation in the terminal: the same prompt the model was trained on, answers as they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.prompt import Prompt
from tyro.conf import UseAppendAction

from phi3v.base.config import check_flags
from phi3v.base.console import console, say
from phi3v.base.errors import InputError
from phi3v.base.jsonfile import Count, NonNegative
from phi3v.data.encode import Turn
from phi3v.data.image import load_image
from phi3v.data.processor import Phi3VProcessor
from phi3v.infer.stream import Sampling, load_to_talk, stream

HELP = "[dim]/image FILE shows a picture with your next message, /new starts again, /quit (or Ctrl-D) leaves[/]"


def chat(
    model: str,
    question: str | None = None,
    /,
    *,
    image: UseAppendAction[tuple[Path, ...]] = (),  # or it would swallow the question
    num_crops: Count | None = None,
    max_new_tokens: Count = 256,
    temperature: NonNegative = 0.0,
) -> None:
    """Ask one question about some pictures, or, without a question, hold a conversation.

    Args:
        model: A run folder (its final model), or a model or adapter folder, or a name on the Hub.
        question: What to ask. Without it, a conversation begins.
        image: Pictures to ask about.
        num_crops: Tiles an image may be cut into. Default: the checkpoint's own.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 always takes the likeliest token; higher is more varied.
    """
    check_flags(locals(), chat)
    for file in image:
        load_image(file)  # before the model, which takes its time
    network, processor = load_to_talk(model, num_crops)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
    if question is not None:
        _reply(network, processor, (Turn(user=question, assistant=None, images=_paths(image)),), sampling)
        return
    say(HELP)
    turns: tuple[Turn, ...] = ()
    pictures = _paths(image)
    while (text := _ask(pictures)) is not None:
        if text == "/new":
            turns, pictures = (), ()
        elif text.split(" ")[0] == "/image":
            pictures = _with_picture(pictures, text.removeprefix("/image").strip())
        elif text.startswith("/"):
            say(HELP)
        elif text:
            try:
                said = _reply(network, processor, (*turns, Turn(user=text, assistant=None, images=pictures)), sampling)
            except InputError as error:  # tags that do not match the pictures, for one
                say(f"[red]{escape(str(error))}[/]")
                continue
            turns = (*turns, Turn(user=text, assistant=said, images=pictures))
            pictures = ()


def _ask(pictures: tuple[str, ...]) -> str | None:
    shown = f" (with {len(pictures)} picture{'s' * (len(pictures) > 1)})" if pictures else ""
    try:
        text = Prompt.ask(f"[bold cyan]you{shown}[/]", console=console).strip()
    except (EOFError, KeyboardInterrupt):
        return None
    return None if text in ("/quit", "/exit") else text


def _with_picture(pictures: tuple[str, ...], file: str) -> tuple[str, ...]:
    if not file:
        say(HELP)
        return pictures
    path = str(Path(file).expanduser())
    try:
        load_image(path)
    except InputError as error:
        say(f"[red]{escape(str(error))}[/]")
        return pictures
    return (*pictures, path)


def _paths(files: tuple[Path, ...]) -> tuple[str, ...]:
    return tuple(str(file) for file in files)


def _reply(network: Any, processor: Phi3VProcessor, turns: tuple[Turn, ...], sampling: Sampling) -> str:
    """Prints the answer while it is written, and returns it."""
    said = ""
    for text in stream(network, processor, turns, sampling):
        print(text[len(said) :], end="", flush=True)
        said = text
    print()
    return said
