"""Checkpoints that a run resumes from, exactly, with any engine and any number of ranks.

Every rank writes the slices it holds of the weights that learn and of the optimizer's state into a file of its own;
when loading, every rank reads just what it needs, whatever the slices were. Random numbers need no state: the loop
seeds every step.

Invariant: a folder called `step-N` is whole. It is written under another name, flushed to disk and renamed; its
manifest holds the size and SHA-256 of every file, which are checked before anything is loaded. Tensors are safetensors,
everything else JSON: nothing is unpickled.
"""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.markup import escape
from safetensors import safe_open
from safetensors.torch import save_file
from torch.optim.lr_scheduler import LRScheduler

from phi3v.base.console import say
from phi3v.base.errors import InputError
from phi3v.base.files import begin, disk_errors, file_digest, finish, flush
from phi3v.base.jsonfile import read_object
from phi3v.base.ranks import ALONE, Ranks
from phi3v.train.engines.engine import Engine, Slice

MANIFEST, STATE = "manifest.json", "state.json"


# -- writing ---------------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    engine: Engine,
    schedule: LRScheduler,
    ranks: Ranks = ALONE,
    keep: int = 2,
    metric: float | None = None,
) -> Path:
    """Writes `folder/step-N`, then removes all but the newest `keep` and the one with the highest `metric`.

    All ranks call this together. Raises InputError, on all of them, when one cannot write, as on a full disk; earlier
    checkpoints are then as they were.
    """
    target = folder / f"step-{step:06d}"

    def start() -> Path:
        for unfinished in folder.glob(".step-*"):  # of a process that was killed here; now its room is needed
            shutil.rmtree(unfinished, ignore_errors=True)
        return begin(target)

    def write_slices() -> dict[str, Any]:
        with disk_errors(target):
            return _write_slices(engine, temporary / f"rank-{ranks.rank:05d}-of-{ranks.num:05d}.safetensors")

    def complete(manifest: dict[str, Any]) -> None:
        state = {"step": step, "metric": metric, "schedule": schedule.state_dict(), "scaler": engine.scaler_state()}
        with disk_errors(target):
            (temporary / STATE).write_text(json.dumps(state))
            manifest[STATE] = checksum(temporary / STATE)
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        finish(temporary, target)
        forget(folder, step, keep)

    temporary = ranks.first_does(start)
    try:
        parts = ranks.gather([ranks.all_do(write_slices)])
        ranks.first_does(lambda: complete({name: entry for (part,) in parts for name, entry in part.items()}))
    except InputError:
        if ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def _write_slices(engine: Engine, file: Path) -> dict[str, Any]:
    """Writes the slices that this rank saves; returns their line of the manifest."""
    tensors, about = {}, {}
    for part in engine.slices():
        if part.saved_here and part.weight.numel():
            count = None if part.count is None else float(part.count)
            about[part.name] = {"shape": part.shape, "start": part.start, "count": count}
            for key, value in {"weight": part.weight, **part.state, **part.scales}.items():
                tensors[f"{key}/{part.name}"] = value.detach().contiguous()
    save_file(tensors, file, metadata={"slices": json.dumps(about)})
    flush(file)
    return {file.name: checksum(file)}


def forget(folder: Path, step: int, keep: int) -> None:
    """Removes all checkpoints but the newest `keep` up to `step` and the best of those. Those after `step` are damaged:
    a run that is at `step` would have resumed from them."""
    paths, metrics = checkpoints(folder), scores(folder, step)
    newest = [one for one in paths if one <= step][-keep:]
    best = max(metrics, key=metrics.__getitem__, default=step)  # the first of equals
    for one in paths.keys() - {*newest, best}:
        shutil.rmtree(paths[one])


# -- reading ---------------------------------------------------------------------------------------------------------


def resume(folder: Path, *, engine: Engine, schedule: LRScheduler, ranks: Ranks = ALONE) -> int:
    """Loads the newest whole checkpoint in `folder` and returns its step, or 0 if there is none. Says which it is."""
    newest, complaints = ranks.first_does(lambda: newest_checkpoint(folder))
    for complaint in complaints:
        say(f"[yellow]damaged checkpoint passed over:[/] {escape(complaint)}")
    if newest is None:
        say(escape(f"no whole checkpoint in {folder.parent}: starting again at step 0"))
        return 0
    say(escape(f"resuming from {newest}"))
    return load_checkpoint(newest, engine=engine, schedule=schedule)


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in `folder`, and what is wrong with the newer ones."""
    complaints = list[str]()
    for path in reversed(checkpoints(folder).values()):
        complaint = damage(path)
        if complaint is None:
            return path, complaints
        complaints.append(complaint)
    return None, complaints


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file, or None if every file is as it was written."""
    try:
        for name, entry in read_object(path / MANIFEST).items():
            if checksum(path / name) != entry:
                return f"{path / name} is damaged: its size or SHA-256 is not that of the file that was written"
    except InputError as error:
        return str(error)
    except OSError as error:  # of a read that fails midway, it does not name the file
        return f"{path / name}: {error.strerror}"
    return None


def load_checkpoint(path: Path, *, engine: Engine, schedule: LRScheduler) -> int:
    """Loads weights, optimizer, schedule and loss scale from a whole checkpoint; returns its step.

    Raises InputError when other weights learn in this run than in the one that was saved.
    """
    state = read_object(path / STATE)
    with ExitStack() as opened, torch.no_grad(), engine.writable() as parts:
        saved = _saved_slices(path, opened)
        learning = {name for name, parameter in engine.model.named_parameters() if parameter.requires_grad}
        if strangers := sorted(learning ^ saved.keys()):
            raise InputError(f"{path}: other weights learn in this run, such as {strangers[0]}: keep the flags")
        for part in parts:
            if part.shape != (shape := saved[part.name][0].shape):
                raise InputError(f"{path}: {part.name} has shape {list(shape)}, expected {list(part.shape)}")
            _read_into(part, saved[part.name])
    schedule.load_state_dict(state["schedule"])
    for group, rate in zip(engine.optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate
    engine.load_scaler_state(state["scaler"])
    return state["step"]


class _SavedSlice(NamedTuple):
    file: Any
    shape: tuple[int, ...]
    start: int
    stop: int
    steps: float | None


def _saved_slices(path: Path, opened: ExitStack) -> dict[str, list[_SavedSlice]]:
    found: dict[str, list[_SavedSlice]] = {}
    for name in sorted(path.glob("rank-*.safetensors")):
        file = opened.enter_context(safe_open(name, framework="pt"))
        for parameter, about in json.loads(file.metadata()["slices"]).items():
            stop = about["start"] + file.get_slice(f"weight/{parameter}").get_shape()[0]
            piece = _SavedSlice(file, tuple(about["shape"]), about["start"], stop, about["count"])
            found.setdefault(parameter, []).append(piece)
    return found


def _read_into(part: Slice, saved: list[_SavedSlice]) -> None:
    """Copies the stretches of the saved slices that lie in this one."""
    stop = part.start + part.weight.numel()
    for piece in saved:
        first, last = max(part.start, piece.start), min(stop, piece.stop)
        if first >= last:
            continue
        stored, here = slice(first - piece.start, last - piece.start), slice(first - part.start, last - part.start)
        part.weight[here] = piece.file.get_slice(f"weight/{part.name}")[stored].to(part.weight.device)
        if part.count is not None:
            part.count.fill_(piece.steps or 0.0)
        for key, value in part.state.items():
            if piece.steps is None:
                value[here] = 0.0  # it has slept since the run began
            else:
                value[here] = piece.file.get_slice(f"{key}/{part.name}")[stored].to(value.device)
        for key, value in part.scales.items():
            value.copy_(piece.file.get_tensor(f"{key}/{part.name}") if piece.steps is not None else torch.zeros(()))


# -- what is there ---------------------------------------------------------------------------------------------------


def checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints in `folder` by step, in order; some may be damaged."""
    named = ((path.name.removeprefix("step-"), path) for path in folder.glob("step-*"))
    return dict(sorted((int(step), path) for step, path in named if step.isdecimal()))


def scores(folder: Path, last: int) -> dict[int, float]:
    """The metrics, by step, of the checkpoints up to step `last` that have one."""
    found = dict[int, float]()
    for step, path in checkpoints(folder).items():
        with suppress(InputError):  # a damaged checkpoint
            metric = read_object(path / STATE).get("metric")
            if step <= last and metric is not None:
                found[step] = metric
    return found


def checksum(file: Path) -> dict[str, Any]:
    """What a manifest says of a file: its size and its SHA-256."""
    return {"bytes": file.stat().st_size, "sha256": file_digest(file)}
