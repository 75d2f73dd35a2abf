"""Whole runs in processes of their own, that can be killed, and what they leave behind."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

MACHINE = Path(__file__).with_name("machine.py")
SETTINGS = dict[str, Any](
    batch_size=4,
    dtype="fp32",
    num_workers=0,
    learning_rate=3e-3,
    warmup_steps=2,
    weight_decay=0.1,
    max_steps=10,
    save_every_steps=3,
    eval_every_steps=4,
    eval_limit=3,
    max_new_tokens=4,
    progress=False,
)
# What is of its time and place, not of the run.
FLEETING = ("time", "seconds", "examples_per_s", "pages_per_s", "tokens_per_s", "tflops", "data_wait", "memory_gb")


def command(**flags: Any) -> list[str]:
    """`train` with flags by their names; True and False are --flag and --no-flag."""
    found = ["train"]
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        found += [flag.replace("--", "--no-", 1) if value is False else flag]
        found += [] if isinstance(value, bool) else [str(value)]
    return found


@dataclass
class Going:
    """A run that has begun."""

    machine: subprocess.Popen
    said_in: Path
    process: int = field(init=False)

    def __post_init__(self) -> None:
        self.process = int(self._answer())

    def _answer(self) -> str:
        assert self.machine.stdout
        return self.machine.stdout.readline()

    def wait(self) -> int:
        """Its exit status; negative: the signal that ended it."""
        return int(self._answer())

    def seconds(self) -> float | None:
        """Of the processor, that it has used; None once it has ended."""
        try:
            fields = Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def said(self) -> str:
        return self.said_in.read_text()


@dataclass(kw_only=True)
class Night:
    """Starts runs, on a tiny model with dropout, in which things go wrong."""

    machine: subprocess.Popen
    folder: Path
    model: Path
    data: Path
    calm: dict[str, Path] = field(default_factory=dict)

    def arguments(self, out: Path, **flags: Any) -> list[str]:
        return command(**{"model": self.model, "train": self.data, "eval": self.data, "out": out, **SETTINGS, **flags})

    def start(self, out: Path, *mischief: Sequence[Any], arguments: list[str] | None = None, **flags: Any) -> Going:
        """Begins a run; `arguments` stand in for the flags."""
        said = self.folder / "said"
        chosen = arguments or self.arguments(out, **flags)
        assert self.machine.stdin
        order = {"arguments": chosen, "said": said, "mischief": mischief}
        self.machine.stdin.write(json.dumps(order, default=str) + "\n")
        self.machine.stdin.flush()
        return Going(self.machine, said)

    def run(self, out: Path, *mischief: Sequence[Any], **how: Any) -> tuple[int, str]:
        """A run to its end: exit status and what it said."""
        going = self.start(out, *mischief, **how)
        return going.wait(), going.said

    def undisturbed(self, **flags: Any) -> Path:
        """The folder of a run with which nothing went wrong; its `changes` are in a file beside it."""
        key = json.dumps(flags, default=str, sort_keys=True)
        if key not in self.calm:
            folder = self.folder / f"calm-{len(self.calm)}"
            folder.mkdir()
            out = folder / "run"
            assert self.run(out, ["changes", out, folder / "changes"], **flags)[0] == 0
            self.calm[key] = out
        return self.calm[key]

    def changes(self, **flags: Any) -> list[str]:
        return (self.undisturbed(**flags).parent / "changes").read_text().splitlines()


@pytest.fixture(scope="session")
def machine() -> Iterator[subprocess.Popen]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, str(MACHINE)], stdin=pipe, stdout=pipe, text=True, env=environment) as found:
        yield found
        assert found.stdin
        found.stdin.close()


@pytest.fixture(scope="session")
def night(
    machine: subprocess.Popen, tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, tiny_data: Path
) -> Night:
    folder = tmp_path_factory.mktemp("night")
    model = folder / "model"
    shutil.copytree(tiny_model_dir, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"resid_pdrop": 0.2, "embd_pdrop": 0.1}))
    return Night(machine=machine, folder=folder, model=model, data=tiny_data)


@pytest.fixture(scope="session")
def left_by() -> Callable[[Path], dict[str, Any]]:
    """What a run has left in its folder, all of it, by file: what two runs that went the same way have alike."""

    def content(file: Path) -> Any:
        if file.name == "log.jsonl":
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            return [
                {k: v for k, v in line.items() if k not in FLEETING} for line in lines if line["kind"] != "complaint"
            ]
        if file.name == "config.json" and file.parent.name != "final":
            groups = json.loads(file.read_text())
            return groups | {"keeping": None, "data": {**groups["data"], "num_workers": None}}
        if file.name == "images.json":
            images = json.loads(file.read_text())
            return {name: entry[:3] for name, entry in images.items()}  # without what changes with the time of a file
        return "" if file.name in (".lock", "report.html") else hashlib.sha256(file.read_bytes()).hexdigest()

    return lambda run: {str(file.relative_to(run)): content(file) for file in sorted(run.rglob("*")) if file.is_file()}
