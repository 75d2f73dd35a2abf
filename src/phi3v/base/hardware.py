"""This machine: device, precision, memory, and the environment that a run records."""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PACKAGES = ("phi3v", "torch", "transformers", "accelerate", "peft", "safetensors", "pillow", "numpy")


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def quiet_deepspeed() -> None:
    """Keep DeepSpeed, which other packages import wherever it is installed, from warning that there is no GPU."""
    if pick_device().type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype for `--dtype`. auto: bf16 where the hardware supports it, else fp16 on CUDA, else fp32.

    A CPU supports fp16, but slowly.
    """
    if wanted != "auto":
        return DTYPES[wanted]
    if has_bf16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware computes in bf16 natively, not by converting to float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_amx_tile_supported())


def pick_tokens_per_pack(wanted: int | None, device: torch.device) -> int:
    """The value of `--max-tokens-per-pack`, by default several pages for a GPU and one page for a CPU.

    One page does not fill a GPU. On a CPU further pages only take memory.
    """
    return wanted or (8192 if device.type == "cuda" else 4096)


def why_not_compile(device: torch.device) -> str | None:
    """The reason why torch.compile does not work on this machine, or None if it works."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "it needs triton"
    c, cpp = (os.environ.get("CC", "cc"), "gcc", "clang"), (os.environ.get("CXX", "c++"), "g++", "clang++")
    compilers = c if device.type == "cuda" else cpp
    return None if any(map(shutil.which, compilers)) else "it needs a C compiler, such as gcc"


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype in flags: bf16, fp16 or fp32."""
    return next(name for name, value in DTYPES.items() if value == dtype)


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory in GB: allocated by PyTorch on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def environment(device: torch.device) -> dict[str, Any]:
    """The versions, hardware and commit that a result depends on, without names of hosts, users or folders."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": card,
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "commit": _commit(),
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    """The installed version, or None, as for phi3v itself in a source tree that was never installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout this module runs from, with a "+" if files are modified; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
