"""The roof: the commands, their flags from dataclasses and signatures, and nothing else.

A command is a line of COMMANDS: nothing but the room of the one that was asked for is imported.
"""

import contextlib
import functools
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro
from rich.console import Console
from rich.markup import escape
from tyro._errors import on_parse_error
from tyro.conf import OmitArgPrefixes as Flat
from tyro.conf import arg

from phi3v import __version__, usage
from phi3v.base.config import Run
from phi3v.base.errors import InputError, RankError
from phi3v.recipes import RECIPES, find_recipe, load_recipe


@dataclass(frozen=True)
class Command:
    """What `phi3v NAME` does."""

    function: str
    """Its room and its name there: the signature has the flags, the docstring their texts."""

    purpose: str
    """In a line."""

    examples: tuple[str, ...]

    common: tuple[str, ...] = ()
    """Flags that `--help` shows, of a command that has too many for a screen. `--help-all` shows all."""


COMMANDS = {
    "convert": Command(
        "phi3v.data.convert:convert",
        "Turn data of another layout into jsonl to train on.",
        ("phi3v convert imagefolder photos --out data --val-fraction 0.1",),
    ),
    "check": Command(
        "phi3v.cli:check",
        "Find everything that is wrong with a data file.",
        ("phi3v check data/train.jsonl --model microsoft/Phi-3.5-vision-instruct",),
    ),
    "look": Command(
        "phi3v.publish.look:look",
        "Show data on a page as the model will see it.",
        ("phi3v look data/train.jsonl --model microsoft/Phi-3.5-vision-instruct",),
    ),
    "plan": Command(
        "phi3v.plan.command:plan",
        "Say what fits on which GPUs, and the command to run.",
        ("phi3v plan --train data/train.jsonl --gpu 4090", "phi3v plan docvqa --gpu H100 --num-gpus 8 --azure job.yml"),
    ),
    "train": Command(
        "phi3v.train.loop:train",
        "Fine-tune a model: checks the data, trains, evaluates, saves, reports.",
        (
            "phi3v train --train data/train.jsonl --eval data/val.jsonl --out runs/mine --lora",
            "phi3v train docvqa --data-dir docvqa --mode lora       a recipe: phi3v recipes lists them",
        ),
        common=(
            *("mode", "data-dir", "full-train", "prompts", "turns"),
            *("model", "num-crops", "dtype", "train", "eval", "batch-size", "questions"),
            *("freeze-vision-model", "lora", "qlora", "lora-rank", "optimizer", "epochs", "learning-rate"),
            *("parallel", "eval-every-steps", "score", "out", "save-every-steps", "resume", "track", "dry-run"),
        ),
    ),
    "recipes": Command(
        "phi3v.cli:recipes",
        "List the recipes, or show one: data, settings, published scores.",
        ("phi3v recipes docvqa", "phi3v recipes forkme > my_task.py       the template of your own"),
    ),
    "evaluate": Command(
        "phi3v.infer.evaluate:evaluate",
        "Answer every question of a data file and score the answers.",
        ("phi3v evaluate runs/mine --data data/test.jsonl",),
    ),
    "report": Command(
        "phi3v.publish.report:report",
        "Show one run, or several beside each other, as one HTML page.",
        ("phi3v report runs/mine", "phi3v report runs/lora runs/full --out compared.html"),
    ),
    "chat": Command(
        "phi3v.infer.chat:chat",
        "Ask about pictures, once or in a conversation.",
        ('phi3v chat runs/mine --image page.png "What is the total?"',),
    ),
    "demo": Command(
        "phi3v.infer.demo:demo",
        "Talk to a model in the browser, beside another if you like.",
        ("phi3v demo runs/mine --compare base",),
    ),
    "predict": Command(
        "phi3v.infer.predict:predict",
        "Answer every question of a data file, to a file; resumable.",
        ("phi3v predict runs/mine data/questions.jsonl --out answers.jsonl",),
    ),
    "export": Command(
        "phi3v.publish.export:export",
        "Make of a run a tested folder to publish or to serve.",
        ("phi3v export runs/mine --out models/mine",),
    ),
    "merge": Command(
        "phi3v.publish.merge:merge",
        "Merge the adapter of a LoRA or QLoRA run into its base model.",
        ("phi3v merge runs/mine --out models/mine",),
    ),
}

NOTES = """phi3v COMMAND --help                 flags, and an example
phi3v --completion bash|zsh|fish     a script that completes commands and flags
phi3v --version"""
HELP = {"-h", "--help", "--help-all"}
SHELLS = ("bash", "zsh", "fish")
BASH_FILES = """# tyro offers an empty word where it knows none; then it may be a file.
_phi3v() { _tyro_phi3v "$@"; [ -n "${COMPREPLY[*]}" ] || COMPREPLY=(); }
complete -o bashdefault -o default -F _phi3v phi3v"""


@dataclass(frozen=True)
class NoOptions:
    """Without a recipe a run has its own flags only."""


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or it warns about every worker process


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; the status is that of `status_of`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return _status(lambda: _run(given))


def status_of(work: Callable[[], Any]) -> int:
    """0 when all went well, 2 when the user can mend what went wrong (one line says what), 130 after Ctrl-C."""
    _silence()
    return _status(work)


def _status(work: Callable[[], Any]) -> int:
    try:
        status = work()
    except InputError as error:
        if _rank() == 0 or isinstance(error, RankError):
            Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        return _end(2)
    except RuntimeError as error:
        from phi3v.base.ranks import lost_another

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
    name, *words = given or ["--help"]
    if name in HELP:
        purposes = {name: command.purpose for name, command in COMMANDS.items()}
        return usage.show(usage.overview("Fine-tune Phi-3.5-vision, score it, and talk to it.", purposes, NOTES))
    if name == "--version":
        return print(f"phi3v {__version__}")
    if name == "--completion":
        return _complete(*words[:1])
    if name not in COMMANDS:
        _unknown(name)

    command, prog = COMMANDS[name], f"phi3v {name}"
    function, words = _function(name, words)
    parts = usage.parts_of(function)
    if HELP & set(words):
        common = () if "--help-all" in words else command.common
        return usage.show(usage.explain(prog, command.purpose, command.examples, parts, common))
    with on_parse_error(usage.refuse(prog, command.examples[0], parts)):
        return tyro.cli(_quietly(function), prog=prog, args=words)


def _unknown(name: str) -> NoReturn:
    if name in RECIPES:
        raise InputError(f"{name} is a recipe: phi3v train {name}")
    if name == "bench":
        raise InputError("phi3v bench is no longer a command: run `python -m benchmarks.bench` in a checkout")
    words = [*COMMANDS, "--help", "--version", "--completion"]
    raise InputError(f"phi3v has no command {name}: {usage.nearest(name, words, 'phi3v --help lists them')}")


def _complete(shell: str = "bash") -> None:
    """Prints a script that completes what may follow `phi3v`."""
    if shell not in SHELLS:
        raise InputError(f"--completion {shell}: it must be {', '.join(SHELLS)}")
    functions = {name: _function(name, [])[0] for name in COMMANDS}
    with contextlib.suppress(SystemExit):
        tyro.extras.subcommand_cli_from_dict(functions, prog="phi3v", args=["--tyro-write-completion", shell, "-"])
    if shell == "bash":
        print(BASH_FILES)


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _end(status: int) -> int:
    """Among several processes an error ends this one at once: tidying up would wait for the others, who wait for it."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _quietly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Silent only once the flags are right: who mistyped one need not wait for torch."""

    @functools.wraps(function)
    def quiet(*words: Any, **flags: Any) -> Any:
        _silence()
        return function(*words, **flags)

    return quiet


def _silence() -> None:
    """No bars and advice of libraries between our own lines; what matters is raised, and errors are still logged."""
    from transformers.utils import logging as transformers_logging

    from phi3v.base.console import speak
    from phi3v.base.hardware import quiet_deepspeed

    speak(_rank() == 0)
    quiet_deepspeed()
    if _rank() > 0:
        warnings.filterwarnings("ignore")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)


def _function(name: str, words: list[str]) -> tuple[Callable[..., Any], list[str]]:
    """What a command calls, and the words that are left for it."""
    if name == "train":
        return _training(*_take_recipe(words))
    room, _, function = COMMANDS[name].function.partition(":")
    return getattr(importlib.import_module(room), function), words


def _take_recipe(words: list[str]) -> tuple[Any, list[str]]:
    """`NAME ...` or `--recipe FILE ...` -> the recipe's module and the rest."""
    if words and not words[0].startswith("-"):
        return find_recipe(words[0]), words[1:]
    for at, word in enumerate(words):
        if word == "--recipe" and at + 1 < len(words):
            return load_recipe(Path(words[at + 1])), [*words[:at], *words[at + 2 :]]
        if word.startswith("--recipe="):
            return load_recipe(Path(word.partition("=")[2])), [*words[:at], *words[at + 1 :]]
    return None, words


def _training(module: Any, words: list[str]) -> tuple[Callable[..., Any], list[str]]:
    """`phi3v train` with the flags and defaults of a recipe: what the task is asked for decides the run's defaults."""
    options: Any = NoOptions if module is None else module.Options
    with on_parse_error(usage.refuse("phi3v train", "", list(usage.parts_of_dataclass(options, options())))):
        asked, _ = tyro.cli(Flat[options], args=words, return_unknown_args=True, add_help=False)  # type: ignore[misc]
    default = Run() if module is None else module.settings(asked)

    def train(
        recipe: Literal[RECIPES] | None = None,  # type: ignore[valid-type]
        /,
        *,
        task: Flat[Annotated[options, arg(name="")]] = asked,
        run: Flat[Annotated[Run, arg(name="")]] = default,
    ) -> None:
        """Fine-tune a model.

        Args:
            recipe: One of `phi3v recipes`, whose data and settings are the defaults; or --recipe FILE, your own.
        """
        from phi3v.recipes.table import published_for
        from phi3v.train import loop as room

        if recipe is not None:  # the first word would have been taken
            raise InputError(f"the recipe comes first: phi3v train {recipe} ...")
        table = getattr(module, "TABLE", None)
        prepared = run if module is None else module.prepare(run, task)
        room.train(prepared, published={} if table is None else published_for(prepared, table))

    return train, words


# -- commands that only call on another room ---------------------------------------------------------------------------


def recipes(name: str | None = None, /) -> None:
    """List the recipes, or show one.

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
    from phi3v.base.console import console
    from phi3v.data import check as room
    from phi3v.data.processor import Phi3VProcessor

    processor = Phi3VProcessor.from_pretrained(model) if model else None
    findings = room.check(
        data, image_root, processor, num_crops=num_crops, max_tokens=max_tokens, num_workers=num_workers
    )
    room.render(findings, console)
    return 0 if findings.ok else 2
