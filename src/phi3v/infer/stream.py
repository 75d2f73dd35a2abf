"""An answer while it is written: the turns of a conversation in, growing text out."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from transformers.generation import BaseStreamer

from phi3v.base.errors import InputError
from phi3v.data.encode import Example, Turn, prompt_text
from phi3v.data.processor import Phi3VProcessor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of an answer are chosen."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 always takes the most likely token."""
    top_p: float = 1.0
    """Draw only from the most likely tokens that together have this probability."""

    @property
    def settings(self) -> dict[str, Any]:
        """The keywords of `generate`."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p} if self.temperature > 0 else {}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0, **drawn}


def stream(
    model: Any,
    processor: Phi3VProcessor,
    turns: tuple[Turn, ...],
    sampling: Sampling,
    dtype: torch.dtype = torch.float32,
    *,
    system: str = "",
) -> Generator[str, None, None]:
    """Yield the answer to the last turn after every token, as far as it is written; at least once.

    It ends at the model's own stop tokens, and the model stops computing when the generator is closed. Raises
    InputError at once, not at the first `next`, for a conversation that cannot be encoded or is too long.
    """
    example = Example(id="chat", system=system, turns=turns, where="chat")
    inputs = processor(prompt_text(example), list(example.images)).to(next(model.parameters()).device)
    tokens, most = inputs["input_ids"].shape[1], model.config.max_position_embeddings
    if tokens + sampling.max_new_tokens > most:
        both = f"the conversation's {tokens:,} tokens and --max-new-tokens {sampling.max_new_tokens:,}"
        raise InputError(f"{both} together exceed the model's {most:,} tokens")
    return _written(model, processor, inputs, sampling, dtype)


def _written(
    model: Any, processor: Phi3VProcessor, inputs: Any, sampling: Sampling, dtype: torch.dtype
) -> Generator[str, None, None]:
    listener = _Listener()

    def write() -> None:
        # no_grad and autocast hold for a thread.
        with torch.no_grad(), torch.autocast(inputs["input_ids"].device.type, dtype, enabled=dtype != torch.float32):
            model.generate(**inputs, **sampling.settings, pad_token_id=processor.pad_token_id, streamer=listener)

    with ThreadPoolExecutor(1, thread_name_prefix="answer") as pool:
        writing = pool.submit(write)
        writing.add_done_callback(lambda _: listener.queue.put(None))
        ids: list[int] = []
        try:
            while (new := listener.queue.get()) is not None:
                ids += new
                # A character may take several tokens; half of one decodes to U+FFFD.
                yield processor.decode(ids, skip_special_tokens=True).rstrip("\ufffd").strip()
            writing.result()  # raises what `generate` raised
        finally:
            listener.closed = True


class _Listener(BaseStreamer):
    """Queues the ids that `generate` hands over, first the prompt's, then one by one the answer's."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[list[int] | None] = SimpleQueue()
        self.closed = False
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        if self.closed:
            raise CancelledError  # nobody waits for the rest of the answer
        if not self._is_prompt:
            self.queue.put(value.tolist())
        self._is_prompt = False

    def end(self) -> None:
        pass
