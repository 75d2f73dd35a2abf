"""N ranks = 1 rank: the ten steps of benchmarks/ranks.py, on every engine and in every mode."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "ranks.py"
ZERO_BY_ANALYSIS = "self_attn.k_proj.bias"
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None

Rows = list[dict[str, Any]]


def measure(folder: Path, *, ranks: tuple[int, ...], engines: str, modes: str, optimizers: str, dtype: str) -> Rows:
    """What the script finds, a row for every engine, mode, optimizer and number of ranks, and for the noise."""
    kept = [name for name in engines.split() if HAS_DEEPSPEED or not name.startswith("zero")]
    flags = {"ranks": map(str, ranks), "engines": kept, "modes": modes.split(), "optimizers": optimizers.split()}
    words = [word for name, values in flags.items() for word in (f"--{name}", *values)]
    command = [sys.executable, str(SCRIPT), *words, "--dtype", dtype, "--json", str(folder / "ranks.json")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    return json.loads((folder / "ranks.json").read_text())["rows"]


def pairs(rows: Rows) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every engine's row with the noise of its mode and optimizer."""
    noise = {(row["mode"], row["optimizer"]): row for row in rows if row["engine"] == "noise"}
    for row in rows:
        if row["engine"] != "noise":
            yield row, noise[row["mode"], row["optimizer"]]


def check(rows: Rows) -> None:
    assert all(name.endswith(ZERO_BY_ANALYSIS) for row in rows for name in row.get("quiet", ()))
    wrong = []
    for row, noise in pairs(rows):
        limit = 5e-5 if row["engine"] == "zero3" or row["mode"] == "qlora" else 1e-5
        # AdamW moves a weight by its learning rate even where the gradient is rounding: as far as the noise does.
        weights = limit if row["optimizer"] == "sgd" else max(limit, 5 * noise["weights"])
        way = max(1e-3, 5 * noise["way"])
        limits = {"loss": limit, "norm": limit, "weights": weights, "way": way}
        wrong += [(row, name) for name, most in limits.items() if not row[name] <= most]
    assert not wrong


def test_two_ranks_learn_what_one_does(tmp_path: Path) -> None:
    rows = measure(
        tmp_path, ranks=(2,), engines="ddp fsdp2 zero2 zero3", modes="full lora", optimizers="adamw", dtype="fp32"
    )
    assert len(rows) == 2 * (1 + (4 if HAS_DEEPSPEED else 2))
    check(rows)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_any_number_of_ranks_learns_what_one_does(ranks: int, tmp_path: Path) -> None:
    """Three is no power of two, and more than the rows of some parameters."""
    modes = "full frozen lora qlora" if ranks != 3 else "full lora"
    engines = "ddp fsdp2 zero1 zero2 zero3"
    check(measure(tmp_path, ranks=(ranks,), engines=engines, modes=modes, optimizers="sgd adamw", dtype="fp32"))


@pytest.mark.slow
def test_the_unusual_modes(tmp_path: Path) -> None:
    """DoRA with rsLoRA, recomputed activations, a tied head, a frozen tower run in chunks, learning rates by part."""
    modes, engines = "dora recompute tied chunks rates", "ddp fsdp2 zero1 zero2 zero3"
    check(measure(tmp_path, ranks=(2,), engines=engines, modes=modes, optimizers="adamw", dtype="fp32"))
