"""Two processes with a vision cache: of a pack of one all pictures are found, while another runs its tower."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phi3v.base.config import Run
from phi3v.train.loop import train

LOG = Callable[..., list[dict[str, Any]]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "where"),
    [("ddp", "disk"), ("ddp", "memory"), ("fsdp2", "memory"), ("zero1", "disk"), ("zero2", "memory")],
)
def test_two_ranks_with_a_cache_learn_what_one_does_without(
    engine: str, where: str, settings_for: Callable[..., Run], tmp_path: Path, log_of: LOG
) -> None:
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'phi3v[deepspeed]'")
    alone = settings_for(out=tmp_path / "alone", freeze=("vision",), epochs=2.0, max_tokens_per_pack=700)
    train(alone)
    flags = {"model": alone.base.model, "train": alone.data.train, "out": tmp_path / "two", "batch-size": 4}
    flags |= {"dtype": "fp32", "num-workers": 0, "learning-rate": 3e-3, "warmup-steps": 2, "epochs": 2}
    flags |= {"max-tokens-per-pack": 700, "freeze": "vision", "parallel": engine, "vision-cache": where}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "phi3v", "train", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    ours, theirs = log_of(tmp_path / "two"), log_of(tmp_path / "alone")
    for name in ("loss", "grad_norm"):
        assert [entry[name] for entry in ours] == pytest.approx([entry[name] for entry in theirs], rel=1e-5)
    per_epoch = [ours[start : start + 4] for start in (0, 4)]
    found = [sum(entry["cached_crops"] for entry in entries) for entries in per_epoch]
    crops = [sum(entry["crops"] for entry in entries) for entries in per_epoch]
    if where == "disk":  # what one has written the other reads
        assert found[0] < crops[0]
        assert found[1] == crops[1]
        assert len(list((tmp_path / "two" / "vision-cache").iterdir())) == 4
    else:  # each keeps what it has met, and must have met pictures that the other has not
        assert found[0] < found[1]
        assert any(0 < entry["cached_crops"] < entry["crops"] for entry in ours)
