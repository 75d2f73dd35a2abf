"""The command line: a table of commands, each a function whose signature gives the flags and docstring the help.

tyro parses, prints help, suggests and completes. Only the module of the command asked for is imported, so that help
and misspelt flags do not wait for torch.
"""

import contextlib
import functools
import importlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from tyro.conf import DisallowNone, arg
from tyro.conf import OmitArgPrefixes as Flat

from phi3v import __version__
from phi3v.base.config import Colors, Orientation, Run, check_flags, read_config
from phi3v.base.errors import InputError, RankError
from phi3v.base.jsonfile import Count, NonNegativeInt
from phi3v.recipes import RECIPES, find_recipe, load_recipe


@dataclass(frozen=True)
class Command:
    """What `phi3v NAME` does."""

    function: str
    """`module:name` of the function to call."""

    purpose: str
    """One line of `phi3v --help`."""

    examples: tuple[str, ...]


COMMANDS = {
    "convert": Command(
        "phi3v.data.convert:convert",
        "Convert data of other layouts to the jsonl format used for training.",
        ("phi3v convert imagefolder photos --out data --val-fraction 0.1",),
    ),
    "check": Command(
        "phi3v.cli:check",
        "Find everything that is wrong with a data file.",
        ("phi3v check data/train.jsonl --model microsoft/Phi-3.5-vision-instruct",),
    ),
    "look": Command(
        "phi3v.publish.look:look",
        "Show data as the model will see it, as an HTML page.",
        ("phi3v look data/train.jsonl --model microsoft/Phi-3.5-vision-instruct",),
    ),
    "plan": Command(
        "phi3v.plan.command:plan",
        "Show what fits on which GPUs, and the command to run.",
        ("phi3v plan --train data/train.jsonl --gpu 4090", "phi3v plan docvqa --gpu H100 --num-gpus 8 --azure job.yml"),
    ),
    "train": Command(
        "phi3v.train.loop:train",
        "Fine-tune a model: check the data, train, evaluate, save, report.",
        (
            "phi3v train --train data/train.jsonl --eval data/val.jsonl --out runs/mine --lora",
            "phi3v train docvqa --data-dir docvqa --mode lora",
            "phi3v train docvqa --help    (with the flags and defaults of this recipe)",
        ),
    ),
    "recipes": Command(
        "phi3v.recipes.table:show",
        "List the recipes, or show one: data, settings, published scores.",
        ("phi3v recipes docvqa", "phi3v recipes forkme > my_task.py    (the template for a recipe of your own)"),
    ),
    "evaluate": Command(
        "phi3v.infer.evaluate:evaluate",
        "Answer every question of a data file and score the answers.",
        ("phi3v evaluate runs/mine --data data/test.jsonl",),
    ),
    "report": Command(
        "phi3v.publish.report:report",
        "Show one run, or compare several, as an HTML page.",
        ("phi3v report runs/mine", "phi3v report runs/lora runs/full --out compared.html"),
    ),
    "chat": Command(
        "phi3v.infer.chat:chat",
        "Ask about images, once or in a conversation.",
        ('phi3v chat runs/mine --image page.png "What is the total?"',),
    ),
    "demo": Command(
        "phi3v.infer.demo:demo",
        "Talk to a model in the browser, or compare two.",
        ("phi3v demo runs/mine --compare base",),
    ),
    "predict": Command(
        "phi3v.infer.predict:predict",
        "Answer every question of a data file and write the answers to a file; resumable.",
        ("phi3v predict runs/mine data/questions.jsonl --out answers.jsonl",),
    ),
    "export": Command(
        "phi3v.publish.export:export",
        "Export a run as a verified, standalone model folder.",
        ("phi3v export runs/mine --out models/mine",),
    ),
    "merge": Command(
        "phi3v.publish.merge:merge",
        "Merge the adapter of a LoRA or QLoRA run into its base model.",
        ("phi3v merge runs/mine --out models/mine",),
    ),
    "env": Command(
        "phi3v.base.env:env",
        "Show versions, devices and installed extras, to paste into an issue.",
        ("phi3v env", "phi3v env --json"),
    ),
}

SHARED = ("train", "evaluate", "predict")
"""What several processes do together; anything else the first one does alone."""

DESCRIPTION = """Fine-tune Phi-3.5-vision, score it, and talk to it.
  phi3v COMMAND --help               flags and examples of a command
  phi3v --completion bash|zsh|fish   a script that completes commands and flags
  phi3v --version"""
SHELLS = ("bash", "zsh", "fish")
BASH_FILES = """# tyro offers an empty word for a positional argument, which may be a file.
_phi3v() { _tyro_phi3v "$@"; [ -n "${COMPREPLY[*]}" ] || COMPREPLY=(); }
complete -o bashdefault -o default -F _phi3v phi3v"""

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise tokenizers warns about every worker process


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the status of `status_of`. Help and misspelt flags end in tyro's SystemExit."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return _status(lambda: _run(words))


def status_of(work: Callable[[], Any]) -> int:
    """Run `work`. Returns 0 on success, 2 on an InputError (printed as one line), 130 after Ctrl-C."""
    _silence()
    return _status(work)


def _run(words: list[str]) -> Any:
    if words[:1] == ["--version"]:
        return print(f"phi3v {__version__}")
    if words[:1] == ["--completion"]:
        return _complete(*words[1:2])
    streams = (sys.stdout, sys.stderr) if _rank() == 0 else (io.StringIO(), io.StringIO())
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):  # one message per job
        work = parse(words)
    _silence()
    return work() if _rank() == 0 or words[0] in SHARED else None


def parse(words: Sequence[str]) -> Callable[[], Any]:
    """Return the call that the words ask for, not yet made. Raises InputError, or SystemExit once tyro has printed."""
    name, *rest = words or ["--help"]
    if name in RECIPES:
        raise InputError(f"{name} is a recipe: phi3v train {name}")
    if name == "bench":
        raise InputError("phi3v bench is no longer a command: run `python -m benchmarks.bench` in a checkout")
    if name not in COMMANDS:  # `--help`, or a misspelt command: no module is needed for either
        return _program(dict.fromkeys(COMMANDS, lambda: None)).cli(prog="phi3v", description=DESCRIPTION, args=[name])
    function, rest = _function(name, rest)

    @functools.wraps(function)
    def call(*positional: Any, **flags: Any) -> Callable[[], Any]:
        return functools.partial(function, *positional, **flags)

    examples = "\n".join(f"  {example}" for example in COMMANDS[name].examples)
    description = f"{COMMANDS[name].purpose}\n\nExamples:\n{examples}"
    return tyro.cli(call, prog=f"phi3v {name}", description=description, args=rest, config=[DisallowNone])


def _complete(shell: str = "bash") -> None:
    """Print a script that completes what may follow `phi3v`."""
    if shell not in SHELLS:
        raise InputError(f"--completion {shell}: it must be {', '.join(SHELLS)}")
    program = _program({name: _function(name, [])[0] for name in COMMANDS})
    with contextlib.suppress(SystemExit):
        program.cli(prog="phi3v", args=["--tyro-write-completion", shell, "-"])
    if shell == "bash":
        print(BASH_FILES)


def _program(functions: Mapping[str, Callable[..., Any]]) -> tyro.extras.SubcommandApp:
    """All commands as one parser, for the overview and for completion."""
    program = tyro.extras.SubcommandApp()
    for name, function in functions.items():
        program.command(name=name, help=COMMANDS[name].purpose)(function)
    return program


def _function(name: str, words: list[str]) -> tuple[Callable[..., Any], list[str]]:
    """The function of a command, and the words that are left to parse for it."""
    if name == "train":
        return _training(words)
    module, _, function = COMMANDS[name].function.partition(":")
    return getattr(importlib.import_module(module), function), words


# -- phi3v train: flags and defaults depend on the recipe --------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Files that set the defaults of the flags."""

    config: Path | None = None
    """Settings as NAME: VALUE in YAML, or the config.json of a run. Flags win over them, and they over a recipe's."""

    recipe: Path | None = None
    """A recipe of your own, whose flags and defaults apply as well; `phi3v recipes forkme` prints a template."""


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """What a task can be asked for that is no recipe's."""


def _training(words: list[str]) -> tuple[Callable[..., Any], list[str]]:
    """`phi3v train` with the flags and defaults of the recipe, which is taken from the words, and of `--config`."""
    parse_known = functools.partial(tyro.cli, prog="phi3v train", return_unknown_args=True, add_help=False)
    module: ModuleType | None = None
    if words and not words[0].startswith("-"):
        module, words = find_recipe(words[0]), words[1:]
    given, words = parse_known(Sources, args=words)
    if given.recipe is not None:
        if module is not None:
            raise InputError(f"--recipe {given.recipe}: a recipe is named already")
        module = load_recipe(given.recipe)
    options: Any = NoOptions if module is None else module.Options
    asked, _ = parse_known(Flat[options], args=words)  # type: ignore[misc]
    default = Run() if module is None else module.settings(asked)
    if given.config is not None:
        default = read_config(given.config, default)

    def train(
        recipe: Literal[RECIPES] | None = None,  # type: ignore[valid-type]
        /,
        *,
        sources: Flat[Annotated[Sources, arg(name="")]] = given,
        task: Flat[Annotated[options, arg(name="")]] = asked,
        run: Flat[Annotated[Run, arg(name="")]] = default,
    ) -> None:
        """Fine-tune a model.

        Args:
            recipe: A recipe, whose data and settings are the defaults: `phi3v recipes` describes them.
        """
        from phi3v.recipes.table import published_for
        from phi3v.train import loop

        # A recipe that stands behind a flag: its settings have not become the defaults.
        for name in (recipe, *map(str, (*run.data.train, *run.data.eval))):
            if name in RECIPES:
                raise InputError(f"the recipe comes first: phi3v train {name} ...")
        prepared = run if module is None else module.prepare(run, task)
        table = getattr(module, "TABLE", None)
        published = {} if table is None else published_for(prepared, table)
        loop.train(prepared, published=published, metrics=getattr(module, "METRICS", ()))

    return train, words


# -- status, output and processes --------------------------------------------------------------------------------------


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


def _end(status: int) -> int:
    """End one of several processes at once: cleaning up would wait for the others, which wait for this one."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _silence() -> None:
    """Turn off the progress bars, advice and warnings of libraries; their errors are still logged."""
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


# -- a command that only calls another module --------------------------------------------------------------------------


def check(
    data: Path,
    /,
    *,
    image_root: Path | None = None,
    model: str | None = None,
    num_crops: Count | None = None,
    exif_orientation: Orientation | None = None,
    image_colors: Colors | None = None,
    max_tokens: Count | None = None,
    num_workers: NonNegativeInt | None = None,
) -> int:
    """Find everything that is wrong with a data file before a run, and show its statistics.

    Args:
        data: Conversations, one JSON object a line.
        image_root: Folder the image paths are relative to. Default: the folder `images` beside the data file.
        model: Count tokens with this model's tokenizer and num_crops.
        num_crops: Tiles an image may be cut into, beside its global view. Default: the model's own, 4 without a model.
        exif_orientation: Turn images as `phi3v train --exif-orientation` does. Default: the model's own, or ignore.
        image_colors: Read colors as `phi3v train --image-colors` does. Default: the model's own, or published.
        max_tokens: Report examples with more tokens than this; needs --model.
        num_workers: Processes that read images. Default: one per core.
    """
    from phi3v.base.console import console
    from phi3v.data import check as room
    from phi3v.data.processor import seeing

    check_flags(locals(), check)
    if max_tokens and not model:
        raise InputError("--max-tokens needs --model, whose tokenizer counts them")
    processor, crops, rules = seeing(model, num_crops, exif_orientation, image_colors)
    findings = room.check(
        data, image_root, processor, num_crops=crops, rules=rules, max_tokens=max_tokens, num_workers=num_workers
    )
    room.render(findings, console)
    return 0 if findings.ok else 2
