"""Whole runs on several processes: the same numbers, files and words as on one; resumed on any other number."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

Launch = Callable[..., "subprocess.CompletedProcess[str]"]
STEPS = 6


def command(processes: int, flags: list[str]) -> list[str]:
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *many, "-m", "phi3v", "train", *flags]


@pytest.fixture
def flags(tiny_model_dir: Path, tiny_data: Path) -> Callable[..., list[str]]:
    def flags(out: Path, **more: Any) -> list[str]:
        chosen = {"model": tiny_model_dir, "train": tiny_data, "eval": tiny_data, "out": out, "batch-size": 4}
        chosen |= {"max-steps": STEPS, "save-every-steps": 2, "max-tokens-per-pack": 700, "learning-rate": "3e-3"}
        chosen |= {"warmup-steps": 1, "max-new-tokens": 4, "num-workers": 0, "dtype": "fp32"}
        chosen |= {name.replace("_", "-"): value for name, value in more.items()}
        return [word for name, value in chosen.items() for word in (f"--{name}", str(value))]

    return flags


@pytest.fixture
def launch() -> Launch:
    def launch(processes: int, flags: list[str]) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command(processes, flags),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    return launch


def steps_of(run: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["kind"] == "step"]


def agree(run: Path, alone: Path) -> None:
    """The same losses and gradient norms, the same answers, and weights that differ by what AdamW makes of rounding."""
    ours, theirs = steps_of(run), steps_of(alone)
    assert [entry["step"] for entry in ours] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm"):
        assert [entry[name] for entry in ours] == pytest.approx([entry[name] for entry in theirs], rel=1e-5)
    assert (run / "predictions.jsonl").read_bytes() == (alone / "predictions.jsonl").read_bytes()
    final, expected = (load_file(folder / "final" / "model.safetensors") for folder in (run, alone))
    assert {name: (t.shape, t.dtype) for name, t in final.items()} == {
        name: (t.shape, t.dtype) for name, t in expected.items()
    }


@pytest.fixture(scope="module")
def engines_at_hand() -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'phi3v[deepspeed]'")


def rewind(run: Path, to: Path, step: int) -> None:
    """A copy of a run as it was after a step."""
    shutil.copytree(run, to)
    for path in [to / "metrics.json", *(to / "checkpoints").iterdir()]:
        if path.name == "metrics.json":
            path.unlink()
        elif int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    shutil.rmtree(to / "final")


@pytest.mark.usefixtures("engines_at_hand")
@pytest.mark.parametrize(
    ("engine", "processes", "then", "then_processes"),
    [
        ("zero2", 2, "auto", 1),
        pytest.param("fsdp2", 2, "ddp", 2, marks=pytest.mark.slow),
        pytest.param("auto", 1, "zero3", 2, marks=pytest.mark.slow),
        pytest.param("zero1", 4, "fsdp2", 2, marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_another_engine_and_other_ranks(
    engine: str,
    processes: int,
    then: str,
    then_processes: int,
    flags: Callable[..., list[str]],
    launch: Launch,
    tmp_path: Path,
) -> None:
    launch(1, flags(tmp_path / "alone"))
    told = launch(processes, flags(tmp_path / "run", parallel=engine)).stdout
    assert told.count("after training: accuracy") == 1  # one process speaks
    agree(tmp_path / "run", tmp_path / "alone")
    parts = sorted(path.name for path in (tmp_path / "run/checkpoints/step-000006").glob("*.safetensors"))
    assert parts == [f"rank-{rank:05d}-of-{processes:05d}.safetensors" for rank in range(processes)]
    rewind(tmp_path / "run", tmp_path / "other", 4)
    told = launch(then_processes, flags(tmp_path / "other", parallel=then, resume="auto")).stdout
    assert "resuming from" in told
    assert "step-000004" in told
    agree(tmp_path / "other", tmp_path / "alone")


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_is_named(
    flags: Callable[..., list[str]], launch: Launch, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = flags(out, max_steps=400, save_every_steps=5)
    job = subprocess.Popen(
        command(2, words),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list((out / "checkpoints").glob("step-0*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    ranks = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    told, _ = job.communicate(timeout=60)
    assert job.returncode != 0
    assert "exitcode  : -9" in told
    assert "rank      : 1 (local_rank: 1)" in told or "rank      : 0 (local_rank: 0)" in told
    launch(2, flags(out, max_steps=400, save_every_steps=5, resume="auto"))
    assert len(steps_of(out)) == 400


def in_trouble(trouble: str, rank: int, words: list[str], at: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A job of two processes of which one has trouble: troubled.py has the kinds."""
    script = str(Path(__file__).with_name("troubled.py"))
    launcher = [*command(2, [])[:-3], script, trouble, str(rank), "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launcher, *words], env=environment, capture_output=True, text=True, timeout=180, cwd=at)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "first"), [(1, "steps"), (0, "steps"), (1, "evaluation")])
def test_a_hanging_rank_ends_the_job_and_is_named_with_its_examples(
    rank: int, first: str, flags: Callable[..., list[str]], tmp_path: Path
) -> None:
    words = flags(tmp_path / "run", rank_timeout_minutes=0.2)
    ended = in_trouble("hangs", rank, words if first == "evaluation" else [*words, "--no-eval-before"])
    assert ended.returncode != 0
    (told,) = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert f"rank {rank} hangs: it has not come for 0.2 minutes" in told
    if first == "steps":
        assert told.startswith("error: step ")  # the first in which it has a picture
        assert f"(examples of rank {rank}: e" in told
    assert "/phi3v/" not in ended.stderr  # torchrun has a traceback of its own


@pytest.mark.slow
def test_a_rank_that_fails_alone_says_why_and_the_others_keep_still(
    flags: Callable[..., list[str]], tmp_path: Path
) -> None:
    ended = in_trouble("breaks", 1, flags(tmp_path / "run"))
    assert ended.returncode != 0
    told = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert len([line for line in told if "broken for once" in line]) == 1
    assert "rank 1: " in "".join(told)
    assert "/phi3v/" not in ended.stderr  # torchrun has a traceback of its own


@pytest.mark.slow
def test_a_folder_that_is_not_shared_is_refused(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    ended = in_trouble("elsewhere", 1, flags(Path("a-run-of-one-host")), at=tmp_path)
    assert ended.returncode != 0
    (told,) = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert "--out a-run-of-one-host: " in told
    assert "it must be on a file system that all hosts share" in told


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "dtype"), [("adamw-8bit", "fp32"), ("adamw-bf16", "bf16")])
def test_a_run_in_less_memory_goes_on_bitwise_on_as_many_processes(
    optimizer: str, dtype: str, flags: Callable[..., list[str]], launch: Launch, tmp_path: Path
) -> None:
    """And its losses are those of one process, as nearly as the precision has it."""
    less = {"optimizer": optimizer, "dtype": dtype}
    launch(1, flags(tmp_path / "alone", **less))
    launch(2, flags(tmp_path / "run", **less))
    losses, alone = ([entry["loss"] for entry in steps_of(tmp_path / name)] for name in ("run", "alone"))
    assert losses == pytest.approx(alone, rel=1e-2 if dtype == "bf16" else 1e-4)
    rewind(tmp_path / "run", tmp_path / "again", 4)
    assert "step-000004" in launch(2, flags(tmp_path / "again", **less, resume="auto")).stdout
    assert [entry["loss"] for entry in steps_of(tmp_path / "again")] == losses
    whole, again = (load_file(tmp_path / name / "final/model.safetensors") for name in ("run", "again"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
