"""Ways to answer questions about pages, timed in turns, as rows and as a table."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.bench.sample import ANSWER, SHAPES, WORDS, Task, build_model, make_examples
from benchmarks.bench.ways import wasteful
from transformers import DynamicCache

from phi3v.base.console import say
from phi3v.base.hardware import pick_device
from phi3v.data.encode import Example, encode
from phi3v.data.encode import questions as questions_of
from phi3v.data.processor import Phi3VProcessor
from phi3v.infer.answering import answer
from phi3v.infer.labels import score_labels
from phi3v.packing.loader import Reading, prompt_packs
from phi3v.packing.trees import PackLimits
from phi3v.recipes.easy_vqa import build_tokenizer

WAYS = ("original", "a page once for its questions", "labels scored instead of written")
"""The first two write answers; the third picks the likeliest of LABELS in one pass."""
LABELS = (ANSWER, "nine eight seven")


@torch.no_grad()
def answer_as_the_original(
    model: Any,
    processor: Phi3VProcessor,
    prompts: Sequence[Example],
    *,
    reading: Reading,
    max_new_tokens: int,
    dtype: torch.dtype,
) -> list[str]:
    """Greedy answers, question by question: each reads and encodes its page, padded, and makes all tokens' logits.

    Every answer is `max_new_tokens` long.
    """
    encoded = [encode(prompt, processor) for prompt in prompts]
    alone = PackLimits(max_tokens_per_pack=1, max_crops_per_pack=1, share_prefix=False, pack=False)
    found = []
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        for batch in prompt_packs(encoded, alone, reading, max_new_tokens=max_new_tokens):
            with wasteful(model, batch.pack, processor.num_crops):
                x = model.model.embed_pack(batch.pack.to(model.device))
            kept = DynamicCache()
            out = model(inputs_embeds=x[None], past_key_values=kept)
            written = [int(out.logits[0, -1].argmax())]
            while len(written) < max_new_tokens:
                out = model(input_ids=torch.tensor([written[-1:]], device=model.device), past_key_values=kept)
                written.append(int(out.logits[0, -1].argmax()))
            found.append((batch.numbers[0], processor.decode(written, skip_special_tokens=True).strip()))
    return [text for _, text in sorted(found)]


def measure_answers(
    task: Task, *, pages: int, questions: int, rounds: int, limits: PackLimits, new_tokens: int, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Times the ways to answer `questions` about each page; a row a way. All written answers are `new_tokens` long."""
    shape, device = SHAPES[task], pick_device()
    processor = Phi3VProcessor(build_tokenizer([" ".join(WORDS)]), num_crops=shape.num_crops)
    processor.stop_token_ids = (-1, -1)  # a random model stops anywhere, and every way is to write as much
    model = build_model("full", processor, device, dtype).eval()
    reading = Reading(image_token_id=processor.image_token_id, num_crops=processor.num_crops)
    how: dict[str, Any] = {"reading": reading, "dtype": dtype, "progress": False}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        examples = make_examples(Path(folder), shape, pages, questions)
        prompts = [question for example in examples for question in questions_of(example)]
        for _ in range(rounds):
            works: list[Callable[[], Any]] = [
                lambda: answer_as_the_original(
                    model, processor, prompts, reading=reading, max_new_tokens=new_tokens, dtype=dtype
                ),
                lambda: answer(model, processor, prompts, limits=limits, max_new_tokens=new_tokens, **how),
                lambda: score_labels(model, processor, prompts, LABELS, limits=limits, **how),
            ]
            results = []
            for way, work in zip(WAYS, works, strict=True):
                started = time.perf_counter()
                results.append(work())
                seconds[way].append(time.perf_counter() - started)
            assert results[0] == [found["prediction"] for found in results[1]] or dtype != torch.float32
    rows = []
    for way, took in seconds.items():
        times = [slow / fast for slow, fast in zip(seconds[WAYS[0]], took, strict=True)]
        rows.append(
            {
                "task": task,
                "variant": way,
                "questions_a_page": questions,
                "new_tokens": 0 if way == WAYS[2] else new_tokens,
                "questions_per_s": len(prompts) / statistics.median(took),
                "times_as_fast": {"median": statistics.median(times), "min": min(times), "max": max(times)},
            }
        )
    return rows


def show_answers(rows: Sequence[dict[str, Any]]) -> None:
    """The table of `measure_answers`."""
    first = rows[0]
    say(
        f"\n[bold]{first['task']}, answering {first['questions_a_page']} questions a page[/] "
        f"({first['new_tokens']} new tokens where answers are written)"
    )
    say(f"{'':<52}{'questions/s':>13}{'times as fast':>22}")
    for row in rows:
        times = row["times_as_fast"]
        spread = f"{times['median']:.2f} ({times['min']:.2f}-{times['max']:.2f})"
        say(f"{row['variant']:<52}{row['questions_per_s']:>13.3f}{spread:>22}")
