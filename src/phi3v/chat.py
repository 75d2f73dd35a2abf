"""A conversation in the terminal: the same prompt the model was trained on, answers as they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.prompt import Prompt
from transformers import TextStreamer

from phi3v.data.chat import Example, Turn, messages
from phi3v.data.image import load_image
from phi3v.data.processor import Phi3VProcessor
from phi3v.errors import InputError
from phi3v.evaluate import model_folder
from phi3v.hardware import pick_device
from phi3v.model.loading import load_model
from phi3v.runlog import console, say

HELP = "[dim]/image FILE shows a picture with your next message, /new starts again, /quit (or Ctrl-D) leaves[/]"


def chat(
    model: str,
    question: str | None = None,
    /,
    *,
    image: tuple[Path, ...] = (),
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
    for file in image:
        load_image(file)  # before the model, which takes its time
    network, processor = load_model(model_folder(model), num_crops=num_crops)
    network = network.to(pick_device()).eval()
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
        elif text.startswith("/image"):
            pictures = _with_picture(pictures, text.removeprefix("/image").strip())
        elif text:
            turns = (*turns, Turn(user=text, assistant=None, images=pictures))
            said = _reply(network, processor, turns, settings)
            turns = (*turns[:-1], Turn(user=text, assistant=said, images=pictures))
            pictures = ()


def _ask(pictures: tuple[str, ...]) -> str | None:
    label = f"you ({len(pictures)} pictures)" if pictures else "you"
    try:
        text = Prompt.ask(f"[bold cyan]{label}[/]", console=console).strip()
    except (EOFError, KeyboardInterrupt):
        return None
    return None if text in ("/quit", "/exit") else text


def _with_picture(pictures: tuple[str, ...], file: str) -> tuple[str, ...]:
    try:
        load_image(file)
        return (*pictures, file)
    except InputError as error:
        console.print(f"[red]{error}[/]")
        return pictures


def _paths(files: tuple[Path, ...]) -> tuple[str, ...]:
    return tuple(str(file) for file in files)


def _reply(network: Any, processor: Phi3VProcessor, turns: tuple[Turn, ...], settings: dict[str, Any]) -> str:
    """Prints the answer while it is written, and returns it."""
    example = Example(id="chat", turns=turns, where="chat")
    text = processor.apply_chat_template(messages(example), add_generation_prompt=True)
    inputs = processor(text, list(example.images)).to(next(network.parameters()).device)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.no_grad():
        out = network.generate(**inputs, **settings, pad_token_id=processor.pad_token_id, streamer=streamer)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
