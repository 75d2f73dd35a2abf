"""Recipes: one file per task, each with the same functions in the same order.

    TABLE                                 what was published, mode by mode (none for easy-VQA and tiny)
    Options                               what the task can be asked for besides the flags of a run
    settings(options) -> Run              the run that learns the task; touches no file
    METRICS                               functions that score an answer like those of `infer.metrics` (optional)
    prepare(run, options) -> Run          makes what the run still needs (idempotent), and returns it as it is trained

The module docstring says what the task is, where its data comes from under which license, and what was scored. A recipe
of your own begins as a copy of `forkme.py`. `table`, `conversion` and `sources` hold what recipes share.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

from phi3v.base.errors import InputError

RECIPES = ("easy-vqa", "tiny", "docvqa", "hateful-memes", "nlvr2", "ucf101")
PARTS = ("Options", "settings", "prepare")


def find_recipe(name: str) -> ModuleType:
    """The recipe of a name as typed, "easy-vqa" or "easy_vqa". Raises InputError, naming the recipes there are."""
    wanted = name.replace("_", "-")
    if wanted not in RECIPES:
        close = difflib.get_close_matches(wanted, RECIPES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the recipes are {', '.join(RECIPES)}"
        if name.endswith(".jsonl"):
            hint = f"did you mean --train {name}?"
        if name.endswith(".py"):
            hint = f"did you mean --recipe {name}?"
        raise InputError(f"no recipe {name}: {hint}")
    return importlib.import_module(f"{__name__}.{wanted.replace('-', '_')}")


def load_recipe(file: Path) -> ModuleType:
    """The recipe in a file of the user's own, whose code is run. Raises InputError, naming the line it stumbles at."""
    if not file.is_file():
        raise InputError(f"--recipe {file}: no such file; `phi3v recipes forkme` prints a template")
    spec = importlib.util.spec_from_file_location(f"phi3v_recipe_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise InputError(f"--recipe {file}: a recipe is a Python file, its name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise InputError(f"{error.filename}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        line = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)][-1]
        raise InputError(f"{file}:{line}: {type(error).__name__}: {error}") from error
    if missing := [part for part in PARTS if not hasattr(module, part)]:
        raise InputError(f"{file}: no recipe without {missing[0]}; `phi3v recipes forkme` prints a template")
    return module
