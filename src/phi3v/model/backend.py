"""Which attention backend a run uses, and the kernel behind it."""

from __future__ import annotations

import torch

from phi3v.base.errors import InputError
from phi3v.model import flash


def pick_attention(wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """`auto`: flash attention where it can be had, else sdpa, which runs anywhere. All compute the same.

    Raises InputError for flash_attention_2 where it cannot be had.
    """
    reason = flash.why_not(device, dtype) if wanted in ("auto", "flash_attention_2") else None
    if wanted == "auto":
        return "sdpa" if reason else "flash_attention_2"
    if reason:
        raise InputError(f"--attention flash_attention_2: {reason}; choose sdpa")
    return wanted


def name_attention(attention: str) -> str:
    """With the kernel behind it, where there are several."""
    kernel = flash.find_kernel() if attention == "flash_attention_2" else None
    return f"{attention} ({kernel.name})" if kernel else attention
