"""Answers on two processes: the files of one, written once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from phi3v.infer.answering import Loading
from phi3v.infer.evaluate import evaluate
from phi3v.infer.predict import predict

SCRIPT = """
import sys
from phi3v.cli import main

model, data, out = sys.argv[1:]
how = ["--max-new-tokens", "6", "--dtype", "fp32"]
labels = ["--labels", "red", "blue", "green"]
assert main(["evaluate", model, "--data", data, "--out", f"{out}/evaluated", "--score", "both", *labels, *how]) == 0
assert main(["predict", model, data, "--out", f"{out}/answers.jsonl", *how]) == 0
assert main(["predict", model, data, "--out", f"{out}/begun.jsonl", *how, "--on-bad-example", "skip"]) == 0
assert main(["export", model, "--out", f"{out}/exported"]) == 0
"""


def test_two_processes_write_what_one_does(tiny_checkpoint_dir: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Also where one process was killed before; what is not shared the first process does alone."""
    flags = {"max_new_tokens": 6, "loading": Loading(dtype="fp32"), "progress": False}
    model, alone = str(tiny_checkpoint_dir), tmp_path / "alone"
    evaluate(model, data=tiny_data, out=alone / "evaluated", score="both", labels=("red", "blue", "green"), **flags)
    lines = predict(model, tiny_data, out=alone / "answers.jsonl", **flags).read_text().splitlines(keepends=True)
    two = tmp_path / "two"
    two.mkdir()
    (two / "begun.jsonl").write_text("".join(lines[:3]) + lines[3][:9])  # one page, and half a line
    settings = (alone / "answers.jsonl.settings.json").read_text()
    (two / "begun.jsonl.settings.json").write_text(settings)
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "script.py"), model, str(tiny_data), str(two)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("predictions ") == 1, "one process speaks"
    for name in ("answers.jsonl", "begun.jsonl"):
        assert (two / name).read_text() == "".join(lines)
    for mine, theirs in zip(*(read(folder / "evaluated/predictions.jsonl") for folder in (two, alone)), strict=True):
        scores = [line.pop("label_log_probs") for line in (mine, theirs)]
        assert mine == theirs
        assert all(abs(scores[0][label] - scores[1][label]) < 1e-4 for label in scores[1])
    metrics = [json.loads((folder / "evaluated/metrics.json").read_text()) for folder in (two, alone)]
    assert metrics[0] == metrics[1]
    assert (two / "exported/model.safetensors").is_file()


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]
