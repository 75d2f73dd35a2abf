"""Every form of every data set, from the download to the scores, by the command a user types."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from phi3v.base.runfolder import RunFolder
from phi3v.cli import main

Write = Callable[[ModuleType, Path], None]


def nlvr2_rows(published: ModuleType, folder: Path) -> None:
    texts = [("so? Answer yes or no.", "Yes."), ("and so? Answer yes or no.", "No.")]
    rows = [([published.picture(2 * n), published.picture(2 * n + 1)], texts[: n % 2 + 1]) for n in range(6)]
    published.write_cauldron(folder, "nlvr2", rows)


def memes_rows(published: ModuleType, folder: Path) -> None:
    rows = [([published.picture(n)], [("hateful?\nAnswer yes or no.", ("Yes.", "No.")[n % 2])]) for n in range(6)]
    published.write_cauldron(folder, "hateful_memes", rows)


def docvqa_rows(published: ModuleType, folder: Path) -> None:
    published.write_mini(folder)
    texts = [("who?\nKeep it short and to the point.", "Ada."), ("when?\nOffer a terse response.", "1843.")]
    published.write_cauldron(folder, "docvqa", [([published.picture(n)], texts) for n in range(4)])


# The command, who writes the data, the examples and the questions there are.
FORMS: dict[str, tuple[str, Write, int, int]] = {
    "mini": ("docvqa", lambda published, folder: published.write_mini(folder), 4, 2),
    "cauldron": ("docvqa --full-train --mode lora", docvqa_rows, 8, 2),
    "challenge": ("docvqa", lambda published, folder: published.write_challenge(folder), 6, 6),
    "memes of the cauldron": ("hateful-memes --eval-size 2 --mode frozen", memes_rows, 4, 2),
    "memes": ("hateful-memes", lambda published, folder: published.write_memes(folder), 5, 3),
    "nlvr2 of the cauldron": ("nlvr2 --eval_size 2", nlvr2_rows, 4, 2),
    "nlvr2": ("nlvr2", lambda published, folder: published.write_nlvr2(folder, lambda *place: "images"), 4, 7),
    "nlvr2 by branches": (
        "nlvr2 --turns branches",
        lambda published, folder: published.write_nlvr2(folder, lambda *place: "."),
        *(7, 7),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_from_the_download_to_the_scores(
    form: str, tmp_path: Path, published: ModuleType, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, write, examples, questions = FORMS[form]
    write(published, tmp_path / "data")
    flags = f"--data-dir {tmp_path / 'data'} --model {tiny_model_dir} --num-crops 1 --dtype fp32 --num-workers 0"
    flags += f" --epochs 1 --batch-size 3 --max-new-tokens 2 --no-eval-before --no-progress --out {tmp_path / 'run'}"
    assert main(f"train {command} {flags}".split()) == 0, capsys.readouterr().err
    run = RunFolder(tmp_path / "run").config
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert sum(entry["examples"] for entry in log if entry["kind"] == "step") == examples
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())["final"]
    assert metrics["questions"] == questions
    assert run.data.questions == ("expected" if command.startswith("docvqa") else "all")
    predictions = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    if form == "challenge":
        assert predictions[0]["answers"] == ["50 0", "50, 0"]
    assert ("auroc" in metrics) == form.startswith("memes")
    if form.startswith("nlvr2"):
        assert ("consistency" in metrics) == ("cauldron" not in form)
