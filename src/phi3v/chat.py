"""A conversation in the terminal: the same prompt the model was trained on, answers as they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.prompt import Prompt
from transformers import TextStreamer
from tyro.conf import UseAppendAction

from phi3v.config import check_numbers
from phi3v.data.chat import Example, Turn, prompt_text
from phi3v.data.image import load_image
from phi3v.data.processor import Phi3VProcessor
from phi3v.errors import InputError
from phi3v.evaluate import model_folder
from phi3v.hardware import pick_device, pick_dtype
from phi3v.model.loading import load_model
from phi3v.runlog import console, say

HELP = "[dim]/image FILE shows a picture with your next message, /new starts again, /quit (or Ctrl-D) leaves[/]"


def chat(
    model: str,
    question: str | None = None,
    /,
    *,
    image: UseAppendAction[tuple[Path, ...]] = (),  # or it would swallow the question
    num_crops: int | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
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
    check_numbers(locals())
    for file in image:
        load_image(file)  # before the model, which takes its time
    device = pick_device()
    network, processor = load_model(
        model_folder(model), dtype=pick_dtype("auto", device), num_crops=num_crops, device=device
    )
    network = network.to(device).eval()
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        settings["temperature"] = temperature
    if question is not None:
        _reply(network, processor, (Turn(user=question, assistant=None, images=_paths(image)),), settings)
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
                said = _reply(network, processor, (*turns, Turn(user=text, assistant=None, images=pictures)), settings)
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


def _reply(network: Any, processor: Phi3VProcessor, turns: tuple[Turn, ...], settings: dict[str, Any]) -> str:
    """Prints the answer while it is written, and returns it."""
    example = Example(id="chat", turns=turns, where="chat")
    inputs = processor(prompt_text(example), list(example.images)).to(next(network.parameters()).device)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.no_grad():
        out = network.generate(**inputs, **settings, pad_token_id=processor.pad_token_id, streamer=streamer)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
