"""`phi3v chat`: a conversation in the terminal, with the prompt the model was trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from rich.markup import escape
from rich.prompt import Prompt
from tyro.conf import UseAppendAction, arg

from phi3v.base.config import check_flags
from phi3v.base.console import console, say
from phi3v.base.errors import InputError
from phi3v.base.jsonfile import Count, NonNegative
from phi3v.data.encode import Turn
from phi3v.data.image import load_image
from phi3v.infer.answering import Answerer, Loading
from phi3v.infer.stream import Sampling

HELP = "[dim]/image FILE shows an image with your next message, /new starts again, /quit (or Ctrl-D) leaves[/]"


def chat(
    model: str,
    question: str | None = None,
    /,
    *,
    image: UseAppendAction[tuple[Path, ...]] = (),  # without it a second word would be an image too, not the question
    system: str = "",
    max_new_tokens: Count = 256,
    temperature: NonNegative = 0.0,
    loading: Annotated[Loading, arg(name="")] = Loading(),
) -> None:
    """Ask one question about some images, or, without a question, hold a conversation.

    Args:
        model: A run folder (its final model), or a model or adapter folder, or a name on the Hub.
        question: What to ask. Without it, a conversation begins.
        image: Images to ask about.
        system: System text in front of the conversation, as in the training data.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 always takes the most likely token; higher is more varied.
    """
    check_flags(locals(), chat)
    images = tuple(map(str, image))
    for file in images:
        load_image(file)  # fails before the model is loaded, which takes its time
    answerer = Answerer.load(model, loading)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
    if question is not None:
        _reply(answerer, (Turn(user=question, assistant=None, images=images),), sampling, system)
        return
    say(HELP)
    turns: tuple[Turn, ...] = ()
    while (text := _ask(images)) is not None:
        command, _, file = text.partition(" ")
        try:
            if text == "/new":
                turns, images = (), ()
            elif command == "/image" and file:
                path = str(Path(file.strip()).expanduser())
                load_image(path)
                images += (path,)
            elif text.startswith("/"):
                say(HELP)
            elif text:
                turn = Turn(user=text, assistant=None, images=images)
                reply = _reply(answerer, (*turns, turn), sampling, system)
                turns, images = (*turns, replace(turn, assistant=reply)), ()
        except InputError as error:  # an image that cannot be read, or tags that do not match the images
            say(f"[red]{escape(str(error))}[/]")


def _ask(images: tuple[str, ...]) -> str | None:
    """What the user typed, without outer whitespace; None at the end of the conversation."""
    attached = f" (with {len(images)} image{'s' * (len(images) > 1)})" if images else ""
    try:
        text = Prompt.ask(f"[bold cyan]you{attached}[/]", console=console).strip()
    except (EOFError, KeyboardInterrupt):
        return None
    return None if text in ("/quit", "/exit") else text


def _reply(answerer: Answerer, turns: tuple[Turn, ...], sampling: Sampling, system: str) -> str:
    """Print the answer while it is written, and return it."""
    written = ""
    for text in answerer.stream(turns, sampling, system):
        print(text[len(written) :], end="", flush=True)
        written = text
    print()
    return written
