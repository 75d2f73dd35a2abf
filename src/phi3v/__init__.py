"""phi3v: fine-tune Phi-3.5-vision natively, exactly and resumably.

Importing it registers the architecture, so that `AutoConfig`, `AutoProcessor`, `AutoModelForCausalLM` and
`AutoModelForImageTextToText` load published checkpoints without remote code.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phi3v.base.errors import InputError
    from phi3v.data.processor import Phi3VProcessor
    from phi3v.model import Phi3VConfig, Phi3VForCausalLM, Phi3VModel

__version__ = "0.1.0"
__all__ = ["InputError", "Phi3VConfig", "Phi3VForCausalLM", "Phi3VModel", "Phi3VProcessor"]

ROOMS = {
    "InputError": "phi3v.base.errors",
    "Phi3VConfig": "phi3v.model",
    "Phi3VForCausalLM": "phi3v.model",
    "Phi3VModel": "phi3v.model",
    "Phi3VProcessor": "phi3v.data.processor",
}


def __getattr__(name: str) -> Any:
    if name not in ROOMS:
        raise AttributeError(f"module 'phi3v' has no attribute {name!r}")
    return getattr(importlib.import_module(ROOMS[name]), name)


def _is_command() -> bool:
    """Whether this process is `phi3v ...` or `python -m phi3v ...`: it imports what its command needs, and no more.

    While `-m` looks for its module, `sys.argv[0]` is "-m".
    """
    started = sys.argv[0] if sys.argv else ""
    return Path(started).name == "phi3v" or (started == "-m" and "phi3v" in sys.orig_argv)


if not _is_command():
    importlib.import_module("phi3v.model")  # which registers it
