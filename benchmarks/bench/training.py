"""Optimizer steps of all variants, timed in turns, as rows and as a table."""

from __future__ import annotations

import ctypes
import gc
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.bench.sample import SHAPES, WORDS, Mode, Task, build_model, make_examples, packs_of, prepare
from benchmarks.bench.ways import Variant, hardware_flops, loss_of, variants

from phi3v.base.config import Optim
from phi3v.base.console import console, progress_bar, say
from phi3v.base.hardware import pick_device
from phi3v.data.encode import encode
from phi3v.data.processor import Phi3VProcessor
from phi3v.model import Phi3VConfig, Phi3VForCausalLM
from phi3v.packing.pack import Pack
from phi3v.packing.schedule import Step
from phi3v.packing.trees import PackLimits
from phi3v.recipes.easy_vqa import build_tokenizer
from phi3v.train.engines.engine import unwrap
from phi3v.train.flops import training_flops
from phi3v.train.optim import build_optimizer


@dataclass(kw_only=True)
class Timed:
    """A variant and what was seen of it."""

    variant: Variant
    packs: list[Pack]
    step: Step
    flops: float
    """Operations that it runs."""
    needed: float
    """Operations that its step needs, however computed."""
    seconds: list[float] = field(default_factory=list)
    peak_gb: float = 0.0
    loss: float = 0.0

    def questions_per_s(self) -> list[float]:
        return [self.step.examples / seconds for seconds in self.seconds]


def run_step(model: Any, optimizer: torch.optim.Optimizer, timed: Timed, num_crops: int, dtype: torch.dtype) -> None:
    """One optimizer step of a variant, timed. The learning rate is zero: all variants see the same weights."""
    device = next(model.parameters()).device
    inner = unwrap(model)
    savings = timed.variant.savings
    if "recompute" in savings:
        inner.gradient_checkpointing_disable()
    else:
        inner.gradient_checkpointing_enable({"use_reentrant": False})
    _forget_peak(device)
    started, loss = time.perf_counter(), torch.zeros((), device=device)
    for pack in timed.packs:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            part = loss_of(model, pack.to(device), savings, num_crops)
        part.backward()
        loss += part.detach()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    timed.loss = float(loss)
    timed.seconds.append(time.perf_counter() - started)
    timed.peak_gb = max(timed.peak_gb, _peak_gb(device))


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc keeps what an earlier variant gave back
            libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def _peak_gb(device: torch.device) -> float:
    """Most memory held since `_forget_peak`: of the GPU, or of this process (0 where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("VmHWM")), 0.0)


def measure(
    mode: Mode,
    task: Task,
    *,
    pages: int,
    questions: int,
    rounds: int,
    ablation: bool,
    limits: PackLimits,
    dtype: torch.dtype,
    progress: bool = True,
) -> list[Timed]:
    """Times all variants, round by round, after one step of each that does not count."""
    shape, device = SHAPES[task], pick_device()
    processor = Phi3VProcessor(build_tokenizer([" ".join(WORDS)]), num_crops=shape.num_crops)
    model = build_model(mode, processor, device, dtype)
    optimizer = build_optimizer(model, Optim(learning_rate=0.0))
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for variant in variants(questions, ablation=ablation):
            examples = make_examples(Path(folder), shape, pages, variant.questions)
            packs, step = packs_of(
                [encode(example, processor) for example in examples], processor, variant.savings, limits
            )
            config = unwrap(model).config
            flops = hardware_flops(model, config, step, variant.savings, shape)
            needed = training_flops(model, config).of(step)
            found.append(Timed(variant=variant, packs=packs, step=step, flops=flops, needed=needed))
    with progress_bar(f"{task}, {mode}", (rounds + 1) * len(found), "steps", show=progress) as advance:
        for number in range(rounds + 1):
            if progress and not console.is_terminal:
                say(f"{task}, {mode}: " + (f"round {number} of {rounds}" if number else "warming up"))
            for timed in found:
                warm_up = replace(timed, packs=timed.packs[:1], seconds=[])
                run_step(model, optimizer, timed if number else warm_up, shape.num_crops, dtype)
                advance(1)
    return found


def ratios(timed: Timed, original: Timed) -> list[float]:
    """Times as many questions a second as the original, round by round."""
    return [ours / theirs for ours, theirs in zip(timed.questions_per_s(), original.questions_per_s(), strict=True)]


def flops_of_the_real_model(mode: Mode, task: Task, found: Sequence[Timed]) -> list[float]:
    """Operations a question of each variant, at the sizes of the published model."""
    config = Phi3VConfig()
    with torch.device("meta"):
        model = prepare(Phi3VForCausalLM(config), mode, torch.bfloat16)
    shape = SHAPES[task]
    return [hardware_flops(model, config, t.step, t.variant.savings, shape) / t.step.examples for t in found]


def rows_of(mode: Mode, task: Task, found: Sequence[Timed], peak: float) -> list[dict[str, Any]]:
    """What is printed and written: a row a variant. `peak` is the device's, in operations a second."""
    original, real = found[0], flops_of_the_real_model(mode, task, found)
    rows = []
    for timed, real_flops in zip(found, real, strict=True):
        pace = statistics.median(timed.questions_per_s())
        times = ratios(timed, original)
        rows.append(
            {
                "task": task,
                "mode": mode,
                "variant": timed.variant.name,
                "savings": sorted(timed.variant.savings),
                "questions_a_page": timed.variant.questions,
                "questions_per_s": pace,
                "pages_per_s": pace / timed.variant.questions,
                "tokens_per_s": pace * timed.step.tokens / timed.step.examples,
                "gflops_per_s": timed.flops / statistics.median(timed.seconds) / 1e9,
                "of_limit": timed.needed / statistics.median(timed.seconds) / peak,
                "peak_gb": timed.peak_gb,
                "loss": timed.loss,
                "times_as_fast": {"median": statistics.median(times), "min": min(times), "max": max(times)},
                "fewer_operations": original.flops / original.step.examples / (timed.flops / timed.step.examples),
                "fewer_operations_real_size": real[0] / real_flops,
            }
        )
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table of one task and mode."""
    say(f"\n[bold]{rows[0]['task']}, {rows[0]['mode']}[/]")
    say(
        f"{'':<50}{'pages/s':>8}{'questions/s':>12}{'times as fast':>19}"
        f"{'operations':>11}{'real size':>10}{'of limit':>9}{'GB':>6}"
    )
    for row in rows:
        times = row["times_as_fast"]
        spread = f"{times['median']:.2f} ({times['min']:.2f}-{times['max']:.2f})"
        say(
            f"{row['variant']:<50}{row['pages_per_s']:>8.3f}{row['questions_per_s']:>12.3f}{spread:>19}"
            f"{'1/' + format(row['fewer_operations'], '.2f'):>11}"
            f"{'1/' + format(row['fewer_operations_real_size'], '.2f'):>10}"
            f"{row['of_limit']:>9.0%}{row['peak_gb']:>6.2f}"
        )
