"""A run on disk: the only code that knows the names of its files.

Reading is tolerant: what a run has not written yet is empty, and a last line that is still being written is left out.
Anything else that is damaged is an InputError that names the file. Writing is not: a folder is claimed by one run,
locked against a second writer, and a finished run is never overwritten.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from phi3v.base.config import Run, run_of
from phi3v.base.errors import InputError
from phi3v.base.files import file_digest, locked, make_folder, write_text
from phi3v.base.jsonfile import convert, read_object

LOCK = ".lock"
BEFORE_IT_BEGAN = {"environment.json", "images.json", "lengths.json", "published.json", "warnings.json"}
BEFORE_IT_BEGAN |= {LOCK, *(f".{name}.unfinished" for name in (*BEFORE_IT_BEGAN, "config.json"))}
"""All that a run leaves that was killed before it wrote config.json, which makes a folder a run folder."""

# Settings that may differ between a run and its continuation: how the work is spread, what surrounds the loop, what
# happens when something goes wrong, and where the images are, whose content is compared.
FREE_GROUPS = ("scaling", "keeping")
FREE_FLAGS = ("num_workers", "on_bad_example", "image_root")


State = Literal["new", "unfinished", "finished"]
Image = Annotated[list[int], Meta(min_length=2, max_length=4)]


class RunFolder:
    """The files of a run, or of an evaluation, which has metrics and predictions only."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.log_file = self.path / "log.jsonl"
        self.report_file = self.path / "report.html"
        self.predictions_file = self.path / "predictions.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.final = self.path / "final"

    # -- reading -----------------------------------------------------------------------------------------------------

    @property
    def is_run(self) -> bool:
        return (self.path / "config.json").exists()

    @property
    def is_finished(self) -> bool:
        return (self.path / "metrics.json").exists()

    @property
    def config(self) -> Run:
        """The settings of the run. Raises InputError, naming the field, for a value that a run cannot have."""
        if not self.is_run:
            raise InputError(f"{self.path} is not a run folder: it has no config.json")
        return run_of(self.settings, str(self.path / "config.json"))

    @property
    def settings(self) -> dict[str, Any]:
        """config.json as it was written, by this or an earlier version; {} without one."""
        return self._read("config")

    @property
    def environment(self) -> dict[str, Any]:
        """Versions, device and commit, and the SHA-256 of the data files as `data`."""
        return self._read("environment")

    @property
    def metrics(self) -> dict[str, Any]:
        """{"before", "final": metric -> value, "baselines"} of a run; metric -> value of an evaluation."""
        return self._read("metrics")

    @property
    def lengths(self) -> dict[str, Any]:
        """Statistics of the training examples: {"tokens", "answer tokens", "crops"}."""
        return self._read("lengths")

    @property
    def published(self) -> dict[str, Any]:
        """The score published for the recipe and mode of the run; {} if there is none."""
        return self._read("published")

    @property
    def trackers(self) -> dict[str, Any]:
        """The ids under which trackers know the run."""
        return self._read("trackers")

    @property
    def images(self) -> dict[str, Image]:
        """Every training image when the run began, by its path below the image root: padded height and width, digest
        and fingerprint of the file (earlier versions kept whole paths, and only the size)."""
        return convert(self._read("images"), dict[str, Image], str(self.path / "images.json"))

    @property
    def warnings(self) -> list[str]:
        """What was odd in the data when the run began."""
        return convert(self._read("warnings"), dict[str, list[str]], str(self.path / "warnings.json")).get("data", [])

    @property
    def log(self) -> list[dict[str, Any]]:
        """The entries of log.jsonl, in the order they were written."""
        return read_lines(self.log_file)

    @property
    def predictions(self) -> list[dict[str, Any]]:
        """The answers of the final evaluation."""
        return read_lines(self.predictions_file)

    def answers_another(self, digest: str) -> bool:
        """Whether there are answers, and not to the data file with this SHA-256."""
        known = (self.environment.get("data") or {}).get("eval")
        return self.predictions_file.exists() and known != digest

    def _read(self, name: str) -> dict[str, Any]:
        file = self.path / f"{name}.json"
        return read_object(file) if file.exists() else {}

    # -- writing -----------------------------------------------------------------------------------------------------

    def save(self, **contents: Any) -> None:
        """Writes NAME.json for every argument: `save(metrics={...})`. Raises InputError if the disk refuses."""
        for name, value in contents.items():
            write_text(self.path / f"{name}.json", json.dumps(value, indent=1))

    def save_predictions(
        self, predictions: Iterable[Mapping[str, Any]], *, before: bool = False, of_set: str = ""
    ) -> None:
        """One answered question a line; a further evaluation set has files of its own, predictions.SET.jsonl."""
        name = f"predictions{'-before' * before}{f'.{of_set}' * bool(of_set)}.jsonl"
        lines = (json.dumps(prediction, ensure_ascii=False) for prediction in predictions)
        write_text(self.path / name, "\n".join(lines) + "\n")

    # -- whose folder it is ------------------------------------------------------------------------------------------

    def claim(self, run: Run) -> State:
        """What a run finds in its folder, before anything is loaded. Raises InputError unless it may write there."""
        path, resume = self.path, run.keeping.resume == "auto"
        if path.exists() and not path.is_dir():
            raise InputError(f"--out {path} is a file: choose another folder")
        if not self.is_run:
            if path.exists() and any(entry.name not in BEFORE_IT_BEGAN for entry in path.iterdir()):
                raise InputError(f"--out {path} is not empty and holds no run: choose another folder")
            return "new"  # the folder is made when there is something to put in it
        if self.is_finished and not resume:
            raise InputError(f"--out {path} holds a finished run: choose another folder")
        if not resume:
            raise InputError(
                f"--out {path} holds an unfinished run: add --resume auto to continue it, or choose another folder"
            )
        self._check_same_settings(run)
        return "finished" if self.is_finished else "unfinished"

    def _check_same_settings(self, run: Run) -> None:
        """An exact continuation needs the same settings, except for those that are free; of files the same content."""
        ours, theirs, now = run.to_dict(), self.config.to_dict(), digests(run)
        place = f"{self.path / 'environment.json'}: data"
        before = convert(self.environment.get("data") or {}, dict[str, str], place)
        weights = [list(one.data.train_files.values()) for one in (self.config, run)]
        if weights[0] != weights[1]:
            raise InputError(
                f"--resume: the weights of --train were {weights[0]} in {self.path}, now they are {weights[1]}"
            )
        for group in ours:
            for name, value in ours[group].items():
                free = name in FREE_FLAGS or (group in FREE_GROUPS and name != "seed")
                known = {flag: digest for flag, digest in before.items() if flag.partition(" ")[0] == name}
                if known and known.keys() == {flag for flag in now if flag.partition(" ")[0] == name}:
                    if changed := [number for number, flag in enumerate(known) if known[flag] != now[flag]]:
                        which = value if isinstance(value, str) else value[changed[0]]
                        what = f"{which} has changed since the run began; start a new run with it"
                        raise InputError(f"--resume: --{name} {what}")
                elif not free and theirs[group][name] != value:
                    flag = name.replace("_", "-")
                    raise InputError(f"--resume: --{flag} was {theirs[group][name]} in {self.path}, now it is {value}")

    @contextmanager
    def locked(self) -> Iterator[str]:
        """Keeps a second writer out; yields a description of the holder. The lock ends with the process."""
        make_folder(self.path)
        with locked(self.path / LOCK, f"--out {self.path}: another run is writing here") as holder:
            yield holder

    def check_shared(self, holder: str, wait_s: float = 30.0) -> None:
        """Raises InputError unless this is the folder that `holder` has locked. Network file systems may take a while.

        The process that holds the lock must not call this: closing the file would release the lock.
        """
        until = time.monotonic() + wait_s
        while True:
            with suppress(OSError):
                if (self.path / LOCK).read_text() == holder:
                    return
            if time.monotonic() > until:
                raise InputError(
                    f"--out {self.path} on {platform.node()} is not the folder of rank 0 ({holder}): "
                    "with several hosts it must be on a file system that all of them share"
                )
            time.sleep(0.2)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a jsonl file; [] if there is none. A last line without a newline is still being written.

    Raises InputError, naming file and line, for a damaged line.
    """
    if not file.exists():
        return []
    *lines, _ = file.read_bytes().split(b"\n")  # not splitlines: a text may hold U+2028
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)  # Python's own decoder, which knows the NaN that Python writes
        except ValueError as error:
            raise InputError(f"{file}:{number}: not JSON: {error}") from error
        if not isinstance(entry, dict):
            raise InputError(f"{file}:{number}: must hold an object")
        entries.append(entry)
    return entries


def digests(run: Run) -> dict[str, str]:
    """SHA-256 of what a run reads, by flag: "train", "train 2" and so on, "eval", and "model" if that is a folder."""
    found = {}
    for flag, files in (("train", run.data.train_files), ("eval", run.data.eval_files.values())):
        for number, file in enumerate(files, start=1):
            if file.is_file():
                found[flag if number == 1 else f"{flag} {number}"] = file_digest(file)
    model = Path(run.base.model)
    return {**found, "model": model_digest(model)} if model.is_dir() else found


def model_digest(folder: Path) -> str:
    """SHA-256 of the weights and settings in a model folder."""
    settings = ("config.json", "preprocessor_config.json", "tokenizer.json")
    files = sorted([*folder.glob("*.safetensors"), *(file for name in settings if (file := folder / name).is_file())])
    return hashlib.sha256("".join(f"{file.name} {file_digest(file)}\n" for file in files).encode()).hexdigest()
