"""Recipes: one file per task, each with the same functions in the same order.

    settings() -> Run        the run that learns the task, with its data and its checkpoint
    prepare(run) -> Run      makes what the run still needs (idempotent), and returns the run as it is to be trained

The module docstring says what the task is, where its data comes from under which licence, and what was scored.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from types import ModuleType

from phi3v.errors import InputError


def find_recipe(name: str) -> ModuleType:
    """The recipe of a name as typed, "easy-vqa" or "easy_vqa". Raises InputError, naming the recipes there are."""
    known = sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))
    wanted = name.replace("_", "-")
    if wanted not in known:
        close = difflib.get_close_matches(wanted, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the recipes are {', '.join(known)}"
        if name.endswith(".jsonl"):
            hint = f"did you mean --train {name}?"
        raise InputError(f"no recipe {name}: {hint}")
    return importlib.import_module(f"{__name__}.{wanted.replace('-', '_')}")
