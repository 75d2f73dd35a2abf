"""Two hosts, each with an address of its own, run one job by the guide's multi-node command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

STEPS = 4


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two network namespaces with a cable between them; 10.77.0.1 and 10.77.0.2."""
    names = [f"phi3v-{os.getpid()}-{side}" for side in "ab"]
    ends = [f"p{os.getpid() % 100000}{side}" for side in "ab"]

    def ip(*words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no network namespaces here: {done.stderr.strip()}")

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, (name, end) in enumerate(zip(names, ends, strict=True), start=1):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    except FileNotFoundError:
        pytest.skip("no network namespaces here: there is no command `ip`")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.fixture
def flags(tiny_model_dir: Path, tiny_data: Path) -> Callable[[Path], list[str]]:
    def flags(out: Path) -> list[str]:
        chosen = {"model": tiny_model_dir, "train": tiny_data, "eval": tiny_data, "out": out, "batch-size": 4}
        chosen |= {"max-steps": STEPS, "max-tokens-per-pack": 700, "max-new-tokens": 4, "num-workers": 0}
        chosen |= {"learning-rate": "3e-3", "warmup-steps": 1, "dtype": "fp32"}
        return ["train", *(word for name, value in chosen.items() for word in (f"--{name}", str(value)))]

    return flags


def steps_of(run: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["kind"] == "step"]


@pytest.mark.slow
def test_two_hosts_run_one_job(hosts: list[str], flags: Callable[[Path], list[str]], tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    alone = [sys.executable, "-m", "phi3v", *flags(tmp_path / "alone")]
    assert subprocess.run(alone, env=environment, capture_output=True).returncode == 0
    jobs = []
    for rank, host in enumerate(hosts):
        launch = ["-m", "torch.distributed.run", "--nproc_per_node=1", "--nnodes=2", f"--node_rank={rank}"]
        launch += ["--master_addr=10.77.0.1", "--master_port=29511", "-m", "phi3v", *flags(tmp_path / "run")]
        interface = f"p{os.getpid() % 100000}{'ab'[rank]}"
        jobs.append(
            subprocess.Popen(
                ["ip", "netns", "exec", host, sys.executable, *launch],
                env={**environment, "GLOO_SOCKET_IFNAME": interface},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    told = [job.communicate(timeout=300) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], told[0][1][-2000:] + told[1][1][-2000:]
    assert "accuracy on 15 test questions" in told[0][0]
    assert "accuracy" not in told[1][0]  # the first process speaks, and it alone writes
    for name in ("loss", "grad_norm"):
        ours, theirs = ([entry[name] for entry in steps_of(tmp_path / run)] for run in ("run", "alone"))
        assert ours == pytest.approx(theirs, rel=1e-5)
    answers = [(tmp_path / run / "predictions.jsonl").read_bytes() for run in ("run", "alone")]
    assert answers[0] == answers[1]
