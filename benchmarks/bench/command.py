"""How much faster than the original recipe, and by what: `python -m benchmarks.bench`.

The original runs one example at a time: every picture padded to `num_crops` + 1 crops, all layers of CLIP, logits of
all tokens in float32, every layer's activations computed twice. Here that is our own model with every saving switched
off, and then one saving after the other is switched on, for the same weights, pictures and examples and with the same
attention kernel and optimizer. All variants take turns in one run, so that a busy machine slows all of them alike, and
all compute the same loss.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from benchmarks.bench.answering import measure_answers, show_answers
from benchmarks.bench.sample import SHAPES, Mode, Task
from benchmarks.bench.training import measure, rows_of, show
from tyro.conf import arg

from phi3v.base.errors import InputError
from phi3v.base.files import write_text
from phi3v.base.hardware import environment, pick_device, pick_dtype, pick_tokens_per_pack
from phi3v.packing.trees import PackLimits
from phi3v.train.flops import peak_tflops


def bench(
    *,
    tasks: tuple[Task, ...] = ("docvqa",),
    modes: tuple[Mode, ...] = ("full",),
    pages: int = 8,
    questions: int = 4,
    rounds: int = 2,
    ablation: bool = True,
    answering: bool = True,
    new_tokens: int = 8,
    full: bool = False,
    max_tokens_per_pack: int | None = None,
    max_crops_per_pack: int = 64,
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    json_file: Annotated[Path | None, arg(name="json")] = None,
    progress: bool = True,
) -> None:
    """Time training steps against the original recipe's way, and what each saving is worth.

    The model is random and small, with the real one's proportions. "times as fast" is questions a second against the
    original in the same round (median, least and most); "operations" what arithmetic says for this model, "real size"
    for the published one; "of limit" what the objective needs, as a share of what the hardware could compute in that
    time. Leave the machine alone meanwhile.

    Args:
        tasks: Shapes of examples: a page, two photos, a meme, a video of eight frames.
        modes: What learns: everything, all but the image embedder, or adapters, also over 4-bit weights.
        pages: Pages of an optimizer step.
        questions: Questions about each page, where a page is shared.
        rounds: How often each variant is timed.
        ablation: Switch the savings on one by one; without, only none and all.
        answering: Time evaluation as well: question by question, page by page, and by scoring labels.
        new_tokens: Length of a written answer.
        full: All tasks, all modes, 64 examples a step.
        max_tokens_per_pack: Tokens of one forward pass. Default: 8192 on a GPU, 4096 on a CPU.
        max_crops_per_pack: 336x336 crops of one forward pass.
        dtype: Precision of the arithmetic.
        json_file: Write the figures here, with the environment.
        progress: Show a progress bar.
    """
    for name, value in {"pages": pages, "questions": questions, "rounds": rounds, "new-tokens": new_tokens}.items():
        if value < 1:
            raise InputError(f"--{name} is {value}, it must be at least 1")
    if full:
        tasks, modes, pages = tuple(SHAPES), get_args(Mode), 64
    device = pick_device()
    precision = pick_dtype(dtype, device)
    limits = PackLimits(
        max_tokens_per_pack=pick_tokens_per_pack(max_tokens_per_pack, device), max_crops_per_pack=max_crops_per_pack
    )
    peak = peak_flops(device, precision)
    content: dict[str, Any] = {"rows": [], "answering": [], "pages": pages, "rounds": rounds}
    content |= {"environment": environment(device), "peak_gflops_per_s": peak / 1e9}
    for task in tasks:
        for mode in modes:
            found = measure(
                mode,
                task,
                pages=pages,
                questions=questions,
                rounds=rounds,
                ablation=ablation,
                limits=limits,
                dtype=precision,
                progress=progress,
            )
            show(own := rows_of(mode, task, found, peak))
            content["rows"] += own
            _keep(json_file, content)
        if answering:
            own = measure_answers(
                task,
                pages=pages,
                questions=questions,
                rounds=rounds,
                limits=limits,
                new_tokens=new_tokens,
                dtype=precision,
            )
            show_answers(own)
            content["answering"] += own
            _keep(json_file, content)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the device at its best: of a known card as its maker says, else of a large product here.

    Busy machines are slow now and then, hence the best of many.
    """
    if (known := peak_tflops(device, dtype)) is not None:
        return known * 1e12
    size, seconds = 2048, []
    a = torch.randn(size, size, device=device, dtype=dtype)
    for _ in range(20):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - started)
    return 2.0 * size**3 / min(seconds)


def _keep(file: Path | None, content: dict[str, Any]) -> None:
    """After every table: a long run may be cut short."""
    if file is not None:
        write_text(file, json.dumps(content, indent=1))
