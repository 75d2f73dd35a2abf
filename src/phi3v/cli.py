"""The roof: `phi3v train`, `evaluate`, `check`, `merge`, `chat`, `report`. Flags come from dataclasses and signatures.

phi3v train --train data/train.jsonl --eval data/test.jsonl --out runs/mine
phi3v train easy-vqa --out runs/easy-vqa            a recipe brings its data and settings; flags still override
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.markup import escape
from tyro.conf import OmitArgPrefixes, UseAppendAction, configure

from phi3v.config import Run
from phi3v.errors import InputError

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or it warns about every worker process


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; 0 when all went well, 2 when the user can mend what went wrong (one line says what)."""
    from phi3v.runlog import console

    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        recipe, given = _take_recipe(given)
        tyro.extras.subcommand_cli_from_dict(_commands(recipe), prog="phi3v", description=__doc__, args=given)
    except InputError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    return 0


def _take_recipe(given: list[str]) -> tuple[Any, list[str]]:
    """`train NAME ...` -> the recipe's module and `train ...`."""
    if len(given) < 2 or given[0] != "train" or given[1].startswith("-"):
        return None, given
    from phi3v.recipes import find_recipe

    return find_recipe(given[1]), [given[0], *given[2:]]


def _commands(recipe: Any) -> dict[str, Callable[..., Any]]:
    from phi3v.chat import chat
    from phi3v.evaluate import evaluate
    from phi3v.merge import merge

    default = Run() if recipe is None else recipe.settings()

    def train(run: OmitArgPrefixes[Run] = default) -> None:
        """Fine-tune a model: checks the data, trains, evaluates, saves, reports."""
        from phi3v import train as room

        room.train(run if recipe is None else recipe.prepare(run))

    def check(
        data: Path,
        /,
        *,
        image_root: Path | None = None,
        model: str | None = None,
        num_crops: int = 4,
        max_tokens: int | None = None,
        num_workers: int | None = None,
    ) -> None:
        """Find everything that is wrong with a data file before a run, and show its statistics.

        Args:
            data: Conversations, one JSON object a line.
            image_root: Folder the image paths are relative to. Default: the folder `images` beside the data file.
            model: Count tokens with this model's tokenizer and num_crops.
            num_crops: Tiles an image may be cut into, without a model.
            max_tokens: More in one example are a problem.
            num_workers: Processes that read images. Default: one per core.
        """
        from phi3v.data import check as room
        from phi3v.data.processor import Phi3VProcessor
        from phi3v.runlog import console

        processor = Phi3VProcessor.from_pretrained(model) if model else None
        findings = room.check(
            data, image_root, processor, num_crops=num_crops, max_tokens=max_tokens, num_workers=num_workers
        )
        room.render(findings, console)
        if findings.problems:
            raise InputError(f"{data}: {len(findings.problems)} problems")

    def report(run: Path, /) -> None:
        """Write report.html of a run folder anew.

        Args:
            run: A run folder.
        """
        from phi3v.report import write_report
        from phi3v.runlog import say

        say(f"report  {write_report(run)}")

    return {
        "train": train,
        "evaluate": evaluate,
        "check": check,
        "merge": merge,
        "chat": configure(UseAppendAction)(chat),  # or --image would swallow the question
        "report": report,
    }
