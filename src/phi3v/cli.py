"""The roof: the commands, their flags from dataclasses and signatures, and nothing else."""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from transformers.utils import logging as transformers_logging
from tyro.conf import OmitArgPrefixes as Flat
from tyro.conf import UseAppendAction, arg, configure

from phi3v.config import Run
from phi3v.errors import InputError, RankError
from phi3v.hardware import quiet_deepspeed
from phi3v.runlog import speak

DESCRIPTION = """Fine-tune Phi-3.5-vision, score it, and talk to it.

    phi3v train --train train.jsonl --eval test.jsonl --out runs/mine
    phi3v train easy-vqa         a recipe brings data and settings; flags override
    phi3v COMMAND --help         all flags
"""


@dataclass(frozen=True)
class NoOptions:
    """Without a recipe a run has its own flags only."""


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or it warns about every worker process


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; the status is that of `status_of`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return status_of(lambda: _run(given))


def status_of(work: Callable[[], Any]) -> int:
    """0 when all went well, 2 when the user can mend what went wrong (one line says what), 130 after Ctrl-C."""
    _silence()
    try:
        status = work()
    except InputError as error:
        if _rank() == 0 or isinstance(error, RankError):
            Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        return _end(2)
    except RuntimeError as error:
        from phi3v.parallel.ranks import lost_another

        if not lost_another(error):
            raise
        if _rank() == 0:
            Console(stderr=True).print("[bold red]error:[/] another process of the job is gone or hangs")
        return _end(1)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        return 130
    return status if isinstance(status, int) else 0


def _run(given: list[str]) -> Any:
    recipe, given = _take_recipe(given)
    return tyro.extras.subcommand_cli_from_dict(
        _commands(recipe, given[1:]), prog="phi3v", description=DESCRIPTION, args=given
    )


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _end(status: int) -> int:
    """Among several processes an error ends this one at once: tidying up would wait for the others, who wait for it."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _silence() -> None:
    """No bars and advice of libraries between our own lines; what matters is raised, and errors are still logged."""
    speak(_rank() == 0)
    quiet_deepspeed()
    if _rank() > 0:
        warnings.filterwarnings("ignore")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)


def _take_recipe(given: list[str]) -> tuple[Any, list[str]]:
    """`train NAME ...` or `train --recipe FILE ...` -> the recipe's module and `train ...`."""
    if len(given) < 2 or given[0] != "train":
        return None, given
    from phi3v.recipes import find_recipe, load_recipe

    if not given[1].startswith("-"):
        return find_recipe(given[1]), [given[0], *given[2:]]
    for at, word in enumerate(given):
        if word == "--recipe" and at + 1 < len(given):
            return load_recipe(Path(given[at + 1])), [*given[:at], *given[at + 2 :]]
        if word.startswith("--recipe="):
            return load_recipe(Path(word.partition("=")[2])), [*given[:at], *given[at + 1 :]]
    return None, given


def _commands(recipe: Any, flags: list[str]) -> dict[str, Callable[..., Any]]:
    from phi3v.bench import bench
    from phi3v.chat import chat
    from phi3v.convert import convert
    from phi3v.demo import demo
    from phi3v.evaluate import evaluate
    from phi3v.merge import merge

    # What the task is asked for decides what the run's defaults are.
    options: Any = NoOptions if recipe is None else recipe.Options
    asked, _ = tyro.cli(Flat[options], args=flags, return_unknown_args=True, add_help=False)  # type: ignore[misc]
    default = Run() if recipe is None else recipe.settings(asked)

    def train(
        task: Flat[Annotated[options, arg(name="")]] = asked,
        run: Flat[Annotated[Run, arg(name="")]] = default,
    ) -> None:
        """Fine-tune a model: checks the data, trains, evaluates, saves, reports.

        With the name of a recipe (`phi3v recipes`) in front of the flags, or --recipe FILE with one of your own, its
        data and settings are the defaults.
        """
        from phi3v import train as room

        room.train(run if recipe is None else recipe.prepare(run, task))

    def recipes(name: str | None = None, /) -> None:
        """List the recipes, or show what one is, its settings mode by mode, and the scores that were published.

        Args:
            name: A recipe, or `forkme` for the template of your own.
        """
        from phi3v.recipes.table import show

        show(name)

    def check(
        data: Path,
        /,
        *,
        image_root: Path | None = None,
        model: str | None = None,
        num_crops: int = 4,
        max_tokens: int | None = None,
        num_workers: int | None = None,
    ) -> int:
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
        return 0 if findings.ok else 2

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
        "recipes": recipes,
        "convert": convert,
        "evaluate": evaluate,
        "check": check,
        "merge": merge,
        "chat": configure(UseAppendAction)(chat),  # or --image would swallow the question
        "demo": demo,
        "report": report,
        "bench": bench,
    }
