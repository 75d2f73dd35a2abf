"""The attention backend that a run uses."""

from __future__ import annotations

import torch

from phi3v.base.errors import InputError
from phi3v.model import flash


def pick_attention(wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend for `--attention`. auto: flash attention where it is available, else sdpa, which runs anywhere.

    All backends compute the same. Raises InputError for flash_attention_2 where it is not available.
    """
    reason = flash.why_not(device, dtype) if wanted in ("auto", "flash_attention_2") else None
    if wanted == "auto":
        return "sdpa" if reason else "flash_attention_2"
    if reason:
        raise InputError(f"--attention flash_attention_2: {reason}; choose sdpa")
    return wanted
