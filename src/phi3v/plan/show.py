"""The rows of a plan as tables for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from phi3v.base.hardware import name_of
from phi3v.plan.devices import Hardware
from phi3v.plan.rows import Row
from phi3v.plan.workload import Work
from phi3v.train.memory import CONTEXT_GB, MEMORY_TO_USE

PARTS = ("weights", "gradients", "optimizer", "activations", "logits")


def as_tables(rows: Sequence[Row], work: Work, hardware: Hardware, model: str) -> Group:
    """What fits and how fast it is, the assumptions, and the commands, the recommended one first."""
    lengths = work.lengths
    about = Table.grid(padding=(0, 2))
    about.add_row("[bold]hardware", escape(f"{hardware}{'' if hardware.here else ' (from the table of cards)'}"))
    about.add_row("[bold]model", escape(model))
    about.add_row("[bold]data", f"{len(lengths):,} examples on {lengths.num_pages:,} pages ({work.source})")
    sizes = f"{lengths.tokens.mean():,.0f} tokens and {lengths.crops.mean():.1f} crops on average"
    about.add_row("", f"{sizes}, {lengths.tokens.max():,} tokens at most (num_crops {work.num_crops})")
    memory = _table("GB of memory per GPU", "", "mode", "fits", "total", *PARTS)
    speed = _table("speed", "", "mode", "examples/s", "hours/epoch", "recomputed")
    commands: list[str] = []
    for number, row in enumerate(rows):
        arrow = "[green]→[/]" if number == 0 and row.fits else ""
        fits = "[green]yes[/]" if row.fits else "[red]no[/]"
        memory.add_row(arrow, row.mode, fits, *(f"{row.memory_gb[part]:.1f}" for part in ("total", *PARTS)))
        if row.fits:
            recomputed = f"{row.recomputed_layers} of {row.num_layers} layers" if row.recomputed_layers else "nothing"
            speed.add_row(arrow, row.mode, _number(row.examples_per_s), _number(row.hours_per_epoch), recomputed)
            recommended = " [green]recommended[/]" if number == 0 else ""
            needs = f"; pip install 'phi3v[{','.join(row.extras)}]'" if row.extras else ""
            title = f"\n[bold]{row.mode}[/]{recommended} [dim]{escape(row.summary + needs)}[/]"
            commands += [title, escape(row.command)]
    if not commands:
        least, mode = min((row.memory_gb["total"], row.mode) for row in rows)
        advice = "Fewer crops (--num-crops) make fewer tokens, more GPUs (--num-gpus) share what trainable weights need"
        commands.append(f"\n[bold red]nothing fits[/]: {mode} needs the least, {least:.1f} GB. {advice}")
    notes = [f"[dim]{line}[/]" for line in assumptions(hardware)]
    return Group(about, memory, *([speed] if rows[0].fits else []), "", *notes, *commands)


def assumptions(hardware: Hardware) -> list[str]:
    """What the figures are based on, in lines."""
    fits = f"fits: the estimated memory is at most {hardware.budget_gb:.1f} GB, {MEMORY_TO_USE:.0%} of a GPU"
    fits += f" less {CONTEXT_GB:.0f} GB for CUDA itself"
    if hardware.card.tflops is None:
        return [fits, "speed: unknown, because the peak of this card is not in the table"]
    peak = f"{hardware.card.tflops:,.0f} TFLOP/s of its data sheet"
    return [
        fits,
        f"speed: calculated, at {hardware.utilization:.0%} of the {peak}",
        "       nothing was measured on a GPU; evaluations, loading and compiling come on top",
    ]


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=f"\n{title}", title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim"
    )
    for name in columns:
        numeric = name in ("total", *PARTS) or "/" in name
        table.add_column(name, justify="right" if numeric else "left", no_wrap=True)
    return table


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def as_json(rows: Sequence[Row], work: Work, hardware: Hardware, model: str) -> dict[str, Any]:
    """The content of the tables."""
    card, lengths = hardware.card, work.lengths
    return {
        "hardware": {
            **_values(card, "name", "memory_gb", "tflops", "attention"),
            "dtype": name_of(card.dtype),
            **_values(hardware, "num_gpus", "nodes", "utilization"),
        },
        "model": model,
        "data": {
            "examples": len(lengths),
            "pages": lengths.num_pages,
            "mean_tokens": float(lengths.tokens.mean()),
            "max_tokens": int(lengths.tokens.max()),
            "mean_crops": float(lengths.crops.mean()),
            **_values(work, "num_crops", "source"),
        },
        "rows": [
            {
                **_values(row, "mode", "fits", "memory_gb", "engine", "recomputed_layers", "flops_per_example"),
                **_values(row, "examples_per_s", "hours_per_epoch", "command"),
                "recommended": number == 0 and row.fits,
                "optimizer": row.run.optim.optimizer,
                "max_tokens_per_pack": row.run.data.max_tokens_per_pack,
            }
            for number, row in enumerate(rows)
        ],
    }


def _values(thing: object, *names: str) -> dict[str, Any]:
    return {name: getattr(thing, name) for name in names}
