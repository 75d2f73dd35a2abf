"""Checkpoints a run can go on from, exactly, on any engine and any number of ranks.

Every rank writes the slices it holds of the weights that learn and of the optimizer's state, into a file of its own;
on the way back every rank reads just what it needs, whatever the slices were. Random numbers need no state: the loop
seeds every step.

Invariant: a folder called `step-N` is whole. It is written under another name, flushed to disk and renamed; its
manifest holds the size and SHA-256 of every file, and both are checked before anything is loaded. Tensors are
safetensors, everything else JSON: nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.optim.lr_scheduler import LRScheduler

from phi3v.base.errors import InputError
from phi3v.base.files import begin, disk_errors, finish, flush
from phi3v.base.jsonfile import NonNegative, NonNegativeInt, check_values, parse_object, read_object
from phi3v.base.ranks import ALONE, Ranks
from phi3v.train.engines.engine import Engine, Slice

MANIFEST, STATE = "manifest.json", "state.json"

STATE_RULES = {"step": NonNegativeInt, "schedule": dict, "scaler": dict | None}
SCHEDULE_RULES = {"last_epoch": NonNegativeInt, "_step_count": NonNegativeInt, "_last_lr": list[NonNegative]}
SLICE_RULES = {"shape": list[NonNegativeInt], "start": NonNegativeInt, "count": NonNegative | None}


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
        for rubbish in folder.glob(".step-*"):  # of a process that was killed here; now its room is needed
            shutil.rmtree(rubbish, ignore_errors=True)
        return begin(target)

    temporary = ranks.first_does(start)

    def write_part() -> dict[str, dict[str, Any]]:
        with disk_errors(target):
            return _write_slices(engine, temporary / f"rank-{ranks.rank:05d}-of-{ranks.num:05d}.safetensors")

    def complete(manifest: dict[str, dict[str, Any]]) -> None:
        with disk_errors(target):
            rest = {
                "step": step,
                "metric": metric,
                "schedule": schedule.state_dict(),
                "scaler": engine.scaler_state(),
            }
            (temporary / STATE).write_text(json.dumps(rest))
            manifest |= {STATE: _entry(temporary / STATE)}
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        finish(temporary, target)
        forget(folder, step, keep)

    try:
        parts = [part for parts in ranks.gather([ranks.all_do(write_part)]) for part in parts]
        ranks.first_does(lambda: complete({name: entry for part in parts for name, entry in part.items()}))
    except InputError:
        if ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def _write_slices(engine: Engine, file: Path) -> dict[str, dict[str, Any]]:
    """Writes what this rank is to save; returns its line of the manifest."""
    tensors, about = {}, {}
    for part in engine.slices():
        if engine.owns(part.name) and part.weight.numel():
            count = None if part.count is None else float(part.count)
            about[part.name] = {"shape": part.shape, "start": part.start, "count": count}
            for key, value in {"weight": part.weight, **part.state, **part.scales}.items():
                tensors[f"{key}/{part.name}"] = value.detach().contiguous()
    save_file(tensors, file, metadata={"slices": json.dumps(about)})
    flush(file)
    return {file.name: _entry(file)}


def load_checkpoint(path: Path, *, engine: Engine, schedule: LRScheduler) -> int:
    """Puts everything back where it was and returns the step.

    Raises InputError when the checkpoint belongs to a run in which other weights learn, or was not written here.
    """
    rest = read_object(path / STATE)
    check_values(f"{path / STATE}: ", rest, STATE_RULES)
    check_values(f"{path / STATE}: schedule.", rest["schedule"], SCHEDULE_RULES)
    rates, groups = rest["schedule"]["_last_lr"], engine.optimizer.param_groups
    if len(rates) != len(groups):
        raise InputError(f"{path / STATE}: {len(rates)} learning rates for {len(groups)} groups of weights")
    engine.make_state()
    with ExitStack() as opened, torch.no_grad(), _not_ours(path):
        saved = _saved(path, opened)
        ours = {part.name: part for part in engine.slices()}
        _same_weights(path, engine, ours, saved)
        for part in ours.values():
            _read_into(part, saved[part.name])
    engine.slices_written()
    # The rest of a schedule's state is what the flags make it; anything else would become an attribute of it.
    schedule.load_state_dict(schedule.state_dict() | {key: rest["schedule"][key] for key in SCHEDULE_RULES})
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    engine.load_scaler_state(rest.get("scaler") or {})
    return rest["step"]


@contextmanager
def _not_ours(path: Path) -> Iterator[None]:
    """Tensors that are not what `_write_slices` writes, under a true checksum: nobody's accident."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, RuntimeError, AttributeError, TypeError, KeyError, IndexError) as error:
        raise InputError(f"{path}: its slices are not what this program writes ({error})") from error


class _Saved(NamedTuple):
    """A slice in a file."""

    file: Any
    shape: tuple[int, ...]
    start: int
    stop: int
    steps: float | None


def _saved(path: Path, opened: ExitStack) -> dict[str, list[_Saved]]:
    found: dict[str, list[_Saved]] = {}
    for name in sorted(path.glob("rank-*.safetensors")):
        file = opened.enter_context(safe_open(name, framework="pt"))
        for parameter, about in parse_object((file.metadata() or {}).get("slices", "{}").encode(), name).items():
            check_values(f"{name}: {parameter}.", about, SLICE_RULES)
            size = file.get_slice(f"weight/{parameter}").get_shape()[0]
            shape, start = tuple(about["shape"]), about["start"]
            found.setdefault(parameter, []).append(_Saved(file, shape, start, start + size, about["count"]))
    return found


def _same_weights(path: Path, engine: Engine, ours: dict[str, Slice], saved: dict[str, list[_Saved]]) -> None:
    learning = {name for name, parameter in engine.model.named_parameters() if parameter.requires_grad}
    if strangers := sorted(learning ^ saved.keys()):
        raise InputError(f"{path}: other weights learn in this run, {strangers[0]} for one: resume with the same flags")
    for name, part in ours.items():
        if part.shape != saved[name][0].shape:
            raise InputError(f"{path}: {name} has shape {list(saved[name][0].shape)}, expected {list(part.shape)}")
        if sum(piece.stop - piece.start for piece in saved[name]) != math.prod(part.shape):
            raise InputError(f"{path}: {name} is incomplete")


def _read_into(part: Slice, saved: list[_Saved]) -> None:
    """Copies the stretches of the stored slices that lie in this one."""
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
                value[here] = 0.0  # it had slept since the run began
            else:
                value[here] = piece.file.get_slice(f"{key}/{part.name}")[stored].to(value.device)
        for key, value in part.scales.items():
            value.copy_(piece.file.get_tensor(f"{key}/{part.name}") if piece.steps is not None else torch.zeros(()))


def newest_checkpoint(folder: Path, ranks: Ranks = ALONE) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in `folder`, and what is wrong with the newer ones that were passed over.

    All ranks call this together; each checks its share of the files.
    """
    complaints: list[str] = []
    for name in ranks.first_does(lambda: [path.name for path in reversed(_steps(folder).values())]):
        complaint = damage(folder / name, share=(ranks.rank, ranks.num))
        found = [line for lines in ranks.gather([complaint] if complaint else []) for line in lines]
        if not found:
            return folder / name, complaints
        complaints.append(found[0])
    return None, complaints


def damage(path: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a checkpoint, naming the file, or None if every file is as it was written.

    `share` (i, n) looks at every n-th file only, from the i-th on.
    """
    try:
        manifest = read_object(path / MANIFEST)
    except InputError as error:
        return str(error)
    if STATE not in manifest:
        return f"{path / MANIFEST}: {STATE} is not listed"
    for name in sorted(manifest)[share[0] :: share[1]]:
        file = path / name
        match manifest[name]:
            case {"bytes": int(size), "sha256": str(digest)}:
                if not file.is_file():
                    return f"{file} is missing"
                if file.stat().st_size != size:
                    return f"{file} has {file.stat().st_size} bytes, {size} were written"
                try:
                    if _sha256(file) != digest:
                        return f"{file} is damaged: its SHA-256 is not the one that was written"
                except OSError as error:
                    return f"{file} cannot be read: {error.strerror}"
            case _:
                return f"{path / MANIFEST}: {name} has no size or SHA-256"
    return None


def scores(folder: Path, last: int) -> dict[int, float]:
    """The metrics, by step, of the checkpoints up to step `last` that have one."""
    found = {step: _metric(path) for step, path in _steps(folder).items() if step <= last}
    return {step: metric for step, metric in found.items() if metric is not None}


def forget(folder: Path, step: int, keep: int) -> None:
    """Removes all checkpoints but the newest `keep` up to `step` and the best of those. A run that has written this one
    would have gone on from a later one, were it not damaged."""
    paths, metrics = _steps(folder), scores(folder, step)
    newest = [one for one in paths if one <= step][-keep:]
    best = sorted(metrics, key=metrics.__getitem__)[-1:]
    for one in paths.keys() - {*newest, *best}:
        shutil.rmtree(paths[one])


def _metric(path: Path) -> float | None:
    try:
        return json.loads((path / STATE).read_text())["metric"]
    except (OSError, ValueError, KeyError):
        return None


def _steps(folder: Path) -> dict[int, Path]:
    """The checkpoints by step, in order."""
    named = ((path.name.removeprefix("step-"), path) for path in folder.glob("step-*"))
    return dict(sorted((int(step), path) for step, path in named if step.isdecimal()))


def _entry(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
