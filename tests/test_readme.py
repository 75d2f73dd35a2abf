"""The commands of the README run, one after the other, and leave the files they promise."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from phi3v.cli import main

REPOSITORY = Path(__file__).parents[1]
PROMISED = {
    "convert": "{out}/train.jsonl",
    "check": None,
    "look": "{data}.html",
    "plan": None,
    "train": "{out}/report.html",
    "evaluate": "{model}/evaluation/{eval}/metrics.json",
    "report": "{out}",
    "predict": "{out}",
    "chat": None,
    "demo": None,
    "export": "{out}/config.json",
    "merge": "{out}/config.json",
    "recipes": None,
    "env": None,
}
"""The file that a command of the README must leave, by the words of the command line; None for those that print."""


def commands(page: Path) -> list[list[str]]:
    """The words of every `phi3v COMMAND ...` in the page's code blocks, fenced or indented."""
    text = re.sub(r" *\\\n\s*", " ", page.read_text(encoding="utf-8"))
    blocks = [*re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL), *re.findall(r"^    .+", text, re.M)]
    lines = (line.strip() for block in blocks for line in block.splitlines())
    return [shlex.split(line, comments=True)[1:] for line in lines if re.match(r"phi3v [a-z]", line)]


def flag(words: list[str], name: str) -> str | None:
    return words[words.index(name) + 1] if name in words else None


def shortened(words: list[str]) -> list[str]:
    """The command on a handful of examples, on a CPU, with the tiny model for the published one."""
    if words[0] != "train":
        return words
    model = [] if words[1] == "tiny" else ["--model", "data/tiny-model"]
    return [*words, *model, "--max-steps", "2", "--batch-size", "4", "--dtype", "fp32"]


def promised(words: list[str]) -> Path | None:
    place = PROMISED[words[0]]
    if place is None:
        return None
    model = words[1] if len(words) > 1 else ""
    out = flag(words, "--out") or f"{model}/report.html"
    data = flag(words, "--data") or ""
    return Path(place.format(out=out, model=model, data=Path(model).with_suffix(""), eval=Path(data).stem))


def converse_in_the_browser(words: list[str]) -> None:
    """Start `phi3v demo`, open its page, and end it as Ctrl-C does."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "phi3v", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        address = next(found[0] for line in process.stdout if (found := re.search(r"http://\S+", line)))
        with urllib.request.urlopen(address) as page:
            assert page.status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait() == 0


def test_the_commands_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From images in class folders to a model to serve. A command that is not in PROMISED fails."""
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'phi3v[demo]'")
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("blue", "red")):
        Path("photos", name).mkdir(parents=True)
        for shade in range(12):
            Image.new("RGB", (40, 40), (200 * number + shade, 0, 200 - 200 * number)).save(f"photos/{name}/{shade}.png")
    way = commands(REPOSITORY / "README.md")
    for words in way:
        if flag(words, "--data") == "data/test.jsonl":  # the reader's own
            shutil.copyfile("data/val.jsonl", "data/test.jsonl")
        if words[0] == "demo":
            converse_in_the_browser(words)
        else:
            assert main(shortened(words)) == 0, (words, capsys.readouterr())
        file = promised(words)
        assert file is None or file.stat().st_size > 0, words
    everything = {"convert", "look", "plan", "train", "demo", "evaluate", "report", "chat", "predict", "export"}
    assert everything <= {words[0] for words in way}
