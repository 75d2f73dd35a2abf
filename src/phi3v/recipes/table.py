"""The guide's tables as data: the settings of each mode, and the score that was published for it.

A mode is a set of flags, and a row of a recipe's table holds its other settings: `with_mode` applies both to a run and
`show` prints the tables. No number is written twice.
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
"""The flags of `Tuning` that each mode sets."""

FROZEN_LEARNT_LITTLE = (
    "suspect: the script of that time froze the token embeddings together with the image embedder, and its re-entrant "
    "gradient checkpointing then gave no layer of the decoder a gradient, so only the last norm and the head were "
    "trained. Here the decoder is trained: expect more."
)
"""Why the frozen rows of Phi-3-vision are below LoRA's. NLVR2's script is newer and does not have this problem."""


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Options of every recipe of the guide, to which each adds its own."""

    mode: Mode | None = None
    """Train with the settings of a row of the recipe's table (`phi3v recipes NAME`): the whole model, all but the image
    embedder, adapters, or adapters on 4-bit weights. Default: the whole model with the original script's defaults."""

    data_dir: Path | None = None
    """Folder of the data set as downloaded. Default: it is downloaded from the Hugging Face Hub."""

    converted_dir: Path | None = None
    """Folder of the converted data. Default: phi3v/NAME in --data-dir if it is writable, else data/NAME."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The settings of a mode, and its published score."""

    mode: Mode

    dtype: Literal["bf16", "fp16"] = "bf16"
    """Precision of the published score. The settings of a mode do not depend on it."""

    lora_rank: int | None = None

    lora_alpha: float | None = None

    batch_size: int = 64

    learning_rate: float

    epochs: float

    score: float | None = None
    """The published score in percent; None if nothing was published, and the settings are ours."""

    note: str = ""
    """Why the published score is doubtful."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """The published settings and scores of a task, and settings of ours for the other modes."""

    command: str
    """The command that takes the modes as `--mode`."""

    metric: str

    model: str
    """The model that was scored."""

    rows: tuple[Row, ...]


def with_mode(run: Run, table: Table, mode: Mode | None) -> Run:
    """The run with exactly the settings of a mode; without a mode, the run itself."""
    if mode is None:
        return run
    row = next(row for row in table.rows if row.mode == mode)
    tuning = replace(run.tuning, **MODES[mode])
    if row.lora_rank is not None:
        tuning = replace(tuning, lora_rank=row.lora_rank, lora_alpha=row.lora_alpha)
    return replace(
        run,
        data=replace(run.data, batch_size=row.batch_size),
        tuning=tuning,
        optim=replace(run.optim, learning_rate=row.learning_rate, epochs=row.epochs),
    )


def published_for(run: Run, table: Table) -> dict[str, Any]:
    """The score published for the mode of a run, in the dtype of the run if there are several; {} if there is none."""
    tuning, dtype = vars(run.tuning), "fp16" if run.base.dtype == "fp16" else "bf16"
    mode = [mode for mode, flags in MODES.items() if all(tuning[flag] == on for flag, on in flags.items())][-1]
    for row in sorted(table.rows, key=lambda row: row.dtype != dtype):
        if row.mode == mode and row.score is not None:
            about = {"model": table.model, "metric": table.metric.lower(), "mode": row.mode, "dtype": row.dtype}
            return {**about, "score": row.score / 100, "note": row.note}
    return {}


def show(name: str | None = None, /) -> None:
    """Print the recipes, or one of them with its table.

    Args:
        name: A recipe, or `forkme` for the template of your own.
    """
    if name == "forkme":
        print(Path(__file__).with_name("forkme.py").read_text(encoding="utf-8"), end="")
    elif name is None:
        console.print(_overview([find_recipe(recipe) for recipe in RECIPES]))
    else:
        console.print(_details(find_recipe(name)))


def _overview(recipes: Sequence[ModuleType]) -> Grid:
    grid = Grid.grid(padding=(0, 2))
    for name, recipe in zip(RECIPES, recipes, strict=True):
        grid.add_row(f"[bold]{name}", escape(_docstring(recipe).partition("\n")[0]))
    grid.add_row("[bold]forkme", "A template for your own recipe: phi3v recipes forkme > my_task.py")
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
    """The head and the rows. A star marks a doubtful score."""
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
