"""Deterministic algorithms for the time of a run (`--deterministic`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """PyTorch uses deterministic algorithms only, and raises a RuntimeError where an operation has none.

    Must be entered before the first product on a GPU, because cuBLAS reads its setting once. Flash attention follows
    PyTorch's mode. At the end the process is as it was.
    """
    if not wanted:
        yield
        return
    mode, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, workspace = torch.backends.cudnn.benchmark, os.environ.get(WORKSPACE)
    os.environ[WORKSPACE] = workspace or ":4096:8"  # the one of the two deterministic values that is fast
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warns)
        torch.backends.cudnn.benchmark = benchmark
        if workspace is None:
            del os.environ[WORKSPACE]
