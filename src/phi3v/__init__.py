"""phi3v: fine-tune Phi-3.5-vision natively, exactly and resumably.

Importing it registers the architecture, so that `AutoConfig`, `AutoProcessor`, `AutoModelForCausalLM` and
`AutoModelForImageTextToText` load published checkpoints without remote code.
"""

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phi3v.base.errors import InputError
    from phi3v.data.processor import Phi3VProcessor
    from phi3v.infer.answering import load
    from phi3v.model import Phi3VConfig, Phi3VForCausalLM, Phi3VModel

__version__ = "0.1.0"
__all__ = ["InputError", "Phi3VConfig", "Phi3VForCausalLM", "Phi3VModel", "Phi3VProcessor", "load"]

MODULES = {
    "InputError": "phi3v.base.errors",
    "Phi3VConfig": "phi3v.model",
    "Phi3VForCausalLM": "phi3v.model",
    "Phi3VModel": "phi3v.model",
    "Phi3VProcessor": "phi3v.data.processor",
    "load": "phi3v.infer.answering",
}


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module 'phi3v' has no attribute {name!r}")
    return getattr(importlib.import_module(MODULES[name]), name)


MOVED = {
    "phi3v.config": "phi3v.base.config",
    "phi3v.convert": "phi3v.data.convert",
    "phi3v.errors": "phi3v.base.errors",
    "phi3v.evaluate": "phi3v.infer.evaluate",
    "phi3v.merge": "phi3v.publish.merge",
    "phi3v.metrics": "phi3v.infer.metrics",
    "phi3v.report": "phi3v.publish.report",
}
"""Documented modules that have moved, by their old names."""


class MovedModules(MetaPathFinder, Loader):
    """Imports the modules of `MOVED` under their old names."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        return spec_from_loader(name, self) if name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        old, new = module.__name__, MOVED[module.__name__]
        warnings.warn(f"{old} is now {new}; the old name works until 0.2", DeprecationWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(new)


sys.meta_path.append(MovedModules())


def _is_command() -> bool:
    """Whether this process is `phi3v ...` or `python -m phi3v ...`: it imports what its command needs, and no more.

    While `-m` looks for its module, `sys.argv[0]` is "-m".
    """
    started = sys.argv[0] if sys.argv else ""
    return Path(started).name == "phi3v" or (started == "-m" and "phi3v" in sys.orig_argv)


if not _is_command():
    importlib.import_module("phi3v.model")  # which registers it
