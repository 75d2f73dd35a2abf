"""The description of a run before it starts: settings, what learns, what a step holds, memory."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.text import Text

from phi3v.base.config import Run
from phi3v.base.console import say
from phi3v.base.hardware import has_bf16, name_of
from phi3v.base.ranks import Ranks
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.parts import count_parameters
from phi3v.train.choices import Choices, memory_of
from phi3v.train.feed import TrainingData
from phi3v.train.memory import largest_pack


def describe(run: Run, data: TrainingData, model: Any, config: Phi3VConfig, ranks: Ranks, choices: Choices) -> None:
    """Prints the resolved run. `model` may be on the meta device."""
    lengths, limits = data.lengths, data.settings.limits
    first, packs = data.schedule(0).packs(0, ranks.num)
    memory = memory_of(run, model, config, largest_pack(lengths, [packs]), ranks, choices)
    _row("model", escape(run.base.model))
    _row(
        "",
        f"{name_of(choices.dtype)} on {ranks.device}, attention {choices.attention}, "
        f"num_crops {data.reading.num_crops}",
    )
    if run.base.fp8:
        _row("", "the decoder learns with products in fp8 (--fp8), which is approximate")
    if choices.compiled:
        _row("", "layers compiled (--compile off runs them as they are)")
    if ranks.num > 1:
        _row("processes", f"{ranks.num}, {choices.engine}")
    for number, (part, (learn, every)) in enumerate(count_parameters(model).items()):
        _row("" if number else "learns", f"{part:<11}{learn:>14,} of {every:>14,} parameters")
    if (quantization := getattr(model, "quantization", None)) is not None:
        _row("", f"base in {quantization}")
    _row("data", f"{len(lengths):,} examples on {lengths.num_pages:,} pages")
    _row("", f"{lengths.tokens.mean():,.0f} tokens an example on average, {lengths.tokens.max():,} at most")
    for number, one in enumerate(data.eval_sets):
        name = f" ({escape(one.name)})" if len(data.eval_sets) > 1 else ""
        _row("" if number else "evaluation", f"{len(one.questions):,} questions{name}")
        _row("", ", ".join(one.metrics))
    _row("steps", f"{data.total_steps:,} ({data.steps_per_epoch:,} an epoch)")
    _row("first step", f"{first.examples} examples on {first.pages} pages")
    each = f" for each of {ranks.num} processes" if ranks.num > 1 else ""
    pack = "pack" if first.packs == 1 else "packs"
    _row("", f"{first.tokens:,} tokens and {first.crops} crops in {first.packs} {pack}{each}")
    unit, scale = ("GB", 1) if memory["total"] >= 1 else ("MB", 1000)
    parts = [f"{name} {size * scale:.1f}" for name, size in memory.items() if name != "total"]
    each = " a process" if ranks.num > 1 else ""
    layers = f", {choices.recompute} layers recomputed (--activation-checkpointing)" if choices.recompute else ""
    _row("memory", f"about {memory['total'] * scale:.1f} {unit}{each}{layers}")
    _row("", ", ".join(parts[:3]) + ",")
    _row("", ", ".join(parts[3:]))
    if run.optim.warmup_steps * 2 > data.total_steps:
        _note(f"{run.optim.warmup_steps} of {data.total_steps} steps are warm-up (--warmup-steps)")
    if run.optim.optimizer == "adamw-bf16" and not has_bf16(ranks.device):
        _note("this hardware has no bf16 arithmetic: adamw-bf16 will be slow")
    if len(oversized := lengths.oversized(limits)):
        _note(f"{len(oversized)} examples exceed a pack's limits; their pages get packs of their own")
    if choices.engine_note:
        _note(escape(choices.engine_note))


def list_settings(run: Run) -> None:
    """Prints every flag with its value, in bold where it is not the default."""
    defaults = Run().to_dict()
    for group, values in run.to_dict().items():
        say(f"[bold]{group}[/]")
        for name, value in values.items():
            words = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            style = "default" if value == defaults[group][name] else "bold"
            say(f"  --{name.replace('_', '-'):<26}[{style}]{escape(words)}[/]")


def _row(label: str, text: str) -> None:
    say(f"[bold]{label}[/]{' ' * (12 - len(Text.from_markup(label)))}{text}")


def _note(text: str) -> None:
    _row("[yellow]note[/]", text)
