"""What this machine is: device, precision, memory, and the facts a run keeps about its surroundings."""

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
    """On a CPU DeepSpeed, which other packages import where it is installed, would complain of having found no GPU."""
    if pick_device().type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """`auto`: bf16 where the hardware computes it, else fp16 on CUDA, else fp32. A CPU computes in fp16, but slowly."""
    if wanted != "auto":
        return DTYPES[wanted]
    if has_bf16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware computes in bf16, and not by way of float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported()


def pick_tokens_per_pack(wanted: int | None, device: torch.device) -> int:
    """Without a wish: several pages for a GPU, which one does not fill; for a CPU one, more only take memory."""
    return wanted or (8192 if device.type == "cuda" else 4096)


def why_not_compile(device: torch.device) -> str | None:
    """Why torch.compile cannot be had here, in words; None if it can."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "it needs triton"
    c, cpp = (os.environ.get("CC", "cc"), "gcc", "clang"), (os.environ.get("CXX", "c++"), "g++", "clang++")
    compilers = c if device.type == "cuda" else cpp
    return None if any(map(shutil.which, compilers)) else "it needs a C compiler, such as gcc"


def name_of(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)


def available_memory() -> int:
    """Bytes of this host's memory that the system reports as available to new work."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def peak_memory_gb(device: torch.device) -> float:
    """Most memory held so far: of the GPU, or, on a CPU, of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, card and commit: what a reader needs to believe a number."""
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
    """None for phi3v itself when it runs from a source tree that was never installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the source tree this runs from, with + if it has changes; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        run = lambda *args: subprocess.run(  # noqa: E731
            ["git", "-C", str(here), *args], capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()
        return run("rev-parse", "--short", "HEAD") + ("+" if run("status", "--porcelain", "-uno", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None
