"""Checkpoints a run can go on from, exactly: weights that learn, optimizer, schedule, loss scale, random state.

Invariant: a folder called `step-N` is whole. It is written under another name, flushed to disk and renamed; its
manifest holds the size and SHA-256 of every file, and both are checked before anything is loaded. Tensors are
safetensors, everything else JSON: nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from phi3v.errors import InputError

MANIFEST = "manifest.json"


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    scaler: Any = None,
    keep: int = 2,
) -> Path:
    """Writes `folder/step-N`, then removes all but the newest `keep`. Raises InputError when the disk is full."""
    target = folder / f"step-{step:06d}"
    with written_whole(target) as temporary:
        learnt = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file(learnt, temporary / "weights.safetensors")
        state = optimizer.state_dict()
        tensors, numbers = {}, {}
        for index, values in state["state"].items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"{index}.{key}"] = value.contiguous()
                else:
                    numbers[f"{index}.{key}"] = value
        save_file(tensors, temporary / "optimizer.safetensors")
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
        save_file(random, temporary / "random.safetensors")
        rest = {
            "step": step,
            "optimizer": {"numbers": numbers, "groups": state["param_groups"]},
            "schedule": schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        (temporary / "state.json").write_text(json.dumps(rest))
        (temporary / MANIFEST).write_text(json.dumps(_manifest(temporary), indent=1))
    for old in _steps(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def load_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    scaler: Any = None,
) -> int:
    """Puts everything back where it was, random state included, and returns the step.

    Raises InputError when the checkpoint belongs to a run in which other weights learn.
    """
    weights = load_file(path / "weights.safetensors")
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if strangers := sorted(learning.keys() ^ weights.keys()):
        raise InputError(f"{path}: other weights learn in this run, {strangers[0]} for one: resume with the same flags")
    with torch.no_grad():
        for name, parameter in learning.items():
            if parameter.shape != weights[name].shape:
                raise InputError(
                    f"{path}: {name} has shape {list(weights[name].shape)}, expected {list(parameter.shape)}"
                )
            parameter.copy_(weights[name])
    rest = json.loads((path / "state.json").read_text())
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*load_file(path / "optimizer.safetensors").items(), *rest["optimizer"]["numbers"].items()]:
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": rest["optimizer"]["groups"]})
    schedule.load_state_dict(rest["schedule"])
    if scaler is not None and rest["scaler"] is not None:
        scaler.load_state_dict(rest["scaler"])
    random = load_file(path / "random.safetensors")
    torch.set_rng_state(random["cpu"])
    for key, value in random.items():
        if key.startswith("cuda.") and torch.cuda.is_available():
            torch.cuda.set_rng_state(value, int(key.removeprefix("cuda.")))
    return rest["step"]


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in `folder`, and what is wrong with the newer ones that were passed over."""
    complaints: list[str] = []
    for path in reversed(_steps(folder)):
        if (complaint := damage(path)) is None:
            return path, complaints
        complaints.append(complaint)
    return None, complaints


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file, or None if every file is as it was written."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{path / MANIFEST}: {error}"
    for name, entry in manifest.items():
        file = path / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{file} has {file.stat().st_size} bytes, {entry['bytes']} were written"
        if _sha256(file) != entry["sha256"]:
            return f"{file} is damaged: its SHA-256 is not the one that was written"
    return None


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` once its block is done and its files are on disk; or nothing at all.

    An existing `target` is replaced. Raises InputError when writing fails, a full disk for one; `target` then is as
    it was before.
    """
    make_folder(target.parent)
    temporary = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            _flush(file)
        _flush(temporary)
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
        _flush(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"cannot write {target}: {error}; what was saved before is untouched") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def make_folder(folder: Path) -> None:
    """Makes a folder, with those it lies in, unless it is there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}") from error


def write_text(file: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = file.with_name(f".{file.name}.unfinished")
    try:
        temporary.write_text(text, encoding="utf-8")
        _flush(temporary)
        os.replace(temporary, file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {file}: {error}") from error


def _steps(folder: Path) -> list[Path]:
    return sorted(
        (path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()),
        key=lambda path: int(path.name.removeprefix("step-")),
    )


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    return {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(folder.iterdir())}


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
