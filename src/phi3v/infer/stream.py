"""A model to talk with: the turns of a conversation in, its answer out while it is written."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers.generation import BaseStreamer, StoppingCriteria, StoppingCriteriaList

from phi3v.base.errors import InputError
from phi3v.base.hardware import pick_device, pick_dtype
from phi3v.data.encode import Example, Turn, prompt_text
from phi3v.data.processor import Phi3VProcessor
from phi3v.infer.evaluate import model_folder
from phi3v.model.loading import load_model


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is chosen."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 always takes the likeliest token."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability are drawn from."""

    @property
    def settings(self) -> dict[str, Any]:
        """For `generate`."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p} if self.temperature > 0 else {}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0, **drawn}


def load_to_talk(name: str | Path, num_crops: int | None = None) -> tuple[Any, Phi3VProcessor]:
    """The model of a run, a model or adapter folder, or a name on the Hub, where it is fastest; with its processor."""
    device = pick_device()
    model, processor = load_model(
        model_folder(name), dtype=pick_dtype("auto", device), num_crops=num_crops, device=device
    )
    return model.to(device).eval(), processor


def stream(
    model: Any, processor: Phi3VProcessor, turns: tuple[Turn, ...], sampling: Sampling
) -> Generator[str, None, None]:
    """The answer to the last turn, again and again with what has been written meanwhile; once at least.

    It ends at the model's own stop tokens, and nothing goes on being written once the iterator is closed. Raises
    InputError, before anything is written, for what cannot be asked.
    """
    example = Example(id="chat", turns=turns, where="chat")
    inputs = processor(prompt_text(example), list(example.images)).to(next(model.parameters()).device)
    tokens, most = inputs["input_ids"].shape[1], model.config.max_position_embeddings
    if tokens + sampling.max_new_tokens > most:
        raise InputError(
            f"the conversation has {tokens:,} tokens; with an answer of up to {sampling.max_new_tokens:,} "
            f"(--max-new-tokens) it must not exceed the model's {most:,}"
        )
    return _written(model, processor, inputs, sampling)


def _written(model: Any, processor: Phi3VProcessor, inputs: Any, sampling: Sampling) -> Generator[str, None, None]:
    heard, left = _Listener(), Event()

    def write() -> None:
        try:
            with torch.no_grad():
                model.generate(
                    **inputs,
                    **sampling.settings,
                    pad_token_id=processor.pad_token_id,
                    streamer=heard,
                    stopping_criteria=StoppingCriteriaList([_Left(left)]),
                )
            heard.queue.put(None)
        except Exception as error:  # raised again where the answer is waited for
            heard.queue.put(error)

    writer = Thread(target=write, daemon=True)
    writer.start()
    ids: list[int] = []
    try:
        while (item := heard.queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            ids += item
            # Of a character that takes several tokens, half is no text yet.
            yield processor.decode(ids, skip_special_tokens=True).rstrip("\ufffd").strip()
    finally:
        left.set()
        writer.join()


class _Listener(BaseStreamer):
    """Takes the ids that `generate` hands over: first the prompt's, then one by one the answer's."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[list[int] | Exception | None] = SimpleQueue()
        self._prompt = True

    def put(self, value: Tensor) -> None:
        if not self._prompt:
            self.queue.put(value.tolist())
        self._prompt = False

    def end(self) -> None:
        pass


class _Left(StoppingCriteria):
    """Ends an answer that nobody waits for."""

    def __init__(self, left: Event) -> None:
        self.left = left

    def __call__(self, input_ids: Tensor, scores: Tensor, **unused: Any) -> Any:
        return torch.full((len(input_ids),), self.left.is_set(), device=input_ids.device)
