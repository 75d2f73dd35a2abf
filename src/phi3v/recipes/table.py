"""The guide's tables as data: how each mode is trained, and what was published for it.

A mode is a set of flags and a row of its recipe's table the rest: `with_mode` applies both to a run, `show` prints the
tables. Nothing is typed twice.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from rich.console import Group
from rich.markup import escape
from rich.table import Table as Grid

from phi3v.base.config import Run
from phi3v.base.console import console
from phi3v.recipes import RECIPES, find_recipe

Mode = Literal["full", "frozen", "lora", "qlora"]

MODES: Mapping[Mode, Mapping[str, Any]] = {
    "full": {},
    "frozen": {"freeze_vision_model": True},
    "lora": {"lora": True},
    "qlora": {"qlora": True},
}
"""What a mode is: the flags of `Tuning` that it sets."""


FROZEN_LEARNT_LITTLE = (
    "suspect: the script of that time froze the token embeddings with the image embedder, and its re-entrant gradient "
    "checkpointing then gave no layer of the decoder a gradient, so that only the last norm and the head learnt. Here "
    "the decoder learns: expect more."
)
"""Why the frozen rows of Phi-3-vision are below LoRA's. NLVR2's script is newer and free of it."""


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What every recipe of the guide can be asked for; each adds its own."""

    mode: Mode | None = None
    """Train as the recipe's table has it (`phi3v recipes NAME`): the whole model, all but the image embedder, adapters,
    or adapters on 4-bit weights. Default: the whole model with the original script's defaults."""

    data_dir: Path | None = None
    """Folder of the data set as it was downloaded. Default: it is downloaded from the Hugging Face Hub."""

    converted_dir: Path | None = None
    """Folder of the converted data. Default: phi3v/NAME in --data-dir if that can be written, else data/NAME."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table."""

    mode: Mode

    dtype: Literal["bf16", "fp16"] = "bf16"
    """Precision of the published score. The settings of a mode do not depend on it."""

    lora_rank: int | None = None

    lora_alpha: float | None = None

    batch_size: int = 64

    learning_rate: float

    epochs: float

    score: float | None = None
    """As published, in percent. None: nothing was published, and the settings are ours."""

    note: str = ""
    """Why the published score is suspect."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """What was published for a task, and settings of ours for the modes that were not."""

    command: str
    """The run of which `--mode` is a row."""

    metric: str

    model: str
    """Whose scores they are."""

    rows: tuple[Row, ...]


def with_mode(run: Run, table: Table, mode: Mode | None) -> Run:
    """The run with exactly the settings of a mode; as it is without one."""
    if mode is None:
        return run
    row = next(row for row in table.rows if row.mode == mode)
    adapters: dict[str, Any] = (
        {} if row.lora_rank is None else {"lora_rank": row.lora_rank, "lora_alpha": row.lora_alpha}
    )
    return replace(
        run,
        data=replace(run.data, batch_size=row.batch_size),
        tuning=replace(run.tuning, **MODES[mode], **adapters),
        optim=replace(run.optim, learning_rate=row.learning_rate, epochs=row.epochs),
    )


def published_for(run: Run, table: Table) -> dict[str, Any]:
    """The score published for the mode that a run trains in, as the run folder keeps it; {} if there is none."""
    tuning = vars(run.tuning)
    mode = [mode for mode, flags in MODES.items() if all(tuning[flag] == on for flag, on in flags.items())][-1]
    rows = [row for row in table.rows if row.mode == mode and row.score is not None]
    rows.sort(key=lambda row: row.dtype != ("fp16" if run.base.dtype == "fp16" else "bf16"))
    if not rows:
        return {}
    row = rows[0]
    about = {"model": table.model, "metric": table.metric.lower(), "mode": row.mode, "dtype": row.dtype}
    return {**about, "score": (row.score or 0) / 100, "note": row.note}


def show(name: str | None = None, /) -> None:
    """Print the recipes, or one of them with its table.

    Args:
        name: A recipe, or `forkme` for the template of your own.
    """
    if name == "forkme":
        print(Path(__file__).with_name("forkme.py").read_text(encoding="utf-8"), end="")  # as it is, for a file
    elif name is None:
        console.print(_overview([find_recipe(recipe) for recipe in RECIPES]))
    else:
        console.print(_details(find_recipe(name)))


def _overview(recipes: Sequence[ModuleType]) -> Grid:
    grid = Grid.grid(padding=(0, 2))
    for name, recipe in zip(RECIPES, recipes, strict=True):
        grid.add_row(f"[bold]{name}", escape(_docstring(recipe).partition("\n")[0]))
    grid.add_row("[bold]forkme", "The template of a recipe of your own: phi3v recipes forkme > my_task.py")
    return grid


def _details(recipe: ModuleType) -> Group:
    parts: list[Any] = [escape(_docstring(recipe)) + "\n"]
    if table := getattr(recipe, "TABLE", None):
        head, *rows = cells(table)
        grid = Grid(*head, title=f"\n{table.command} --mode MODE", title_justify="left", title_style="bold")
        for row in rows:
            grid.add_row(*row)
        parts += [grid, f"{table.metric} in percent, of {table.model}", *(f"* {note}" for note in notes(table))]
    return Group(*parts)


def _docstring(recipe: ModuleType) -> str:
    return inspect.cleandoc(recipe.__doc__ or "")


def cells(table: Table) -> list[list[str]]:
    """Head and rows. A score with a star is suspect."""
    cells = [["mode", "dtype", "LoRA rank", "alpha", "batch size", "learning rate", "epochs", table.metric]]
    for row in table.rows:
        rate = f"{row.learning_rate:.1e}".replace(".0e", "e").replace("e-0", "e-")
        numbers = [row.lora_rank, row.lora_alpha, row.batch_size, rate, row.epochs]
        score = "our settings" if row.score is None else f"{row.score:.2f}{'*' if row.note else ''}"
        cells.append([row.mode, row.dtype, *("-" if number is None else f"{number}" for number in numbers), score])
    return cells


def notes(table: Table) -> list[str]:
    """Why scores are suspect, each reason once."""
    return list(dict.fromkeys(row.note for row in table.rows if row.note))
