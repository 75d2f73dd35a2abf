"""What safetensors files hold, from their headers alone: names and shapes, before a tensor is read or made room for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from phi3v.base.errors import InputError
from phi3v.base.jsonfile import check_values, read_object

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"

Shapes = Mapping[str, tuple[int, ...]]


def checkpoint_shapes(folder: Path) -> Shapes:
    """Of all tensors of a checkpoint, in one file or in those its index names. Raises InputError if there is none.

    So it does for what transformers would read as well, or instead: an adapter, a distributed checkpoint of PyTorch.
    """
    for other in ("adapter_config.json", "shard-*.safetensors"):
        if stray := next(folder.glob(other), None):
            raise InputError(f"{folder}: not a plain checkpoint, there is {stray.name}")
    if (folder / WHOLE).is_file():
        return file_shapes(folder / WHOLE)
    if not (folder / INDEX).is_file():
        raise InputError(f"{folder}: no file named {WHOLE} or {INDEX}; other kinds of weights are not read")
    index = read_object(folder / INDEX)
    check_values(f"{folder / INDEX}: ", index, {"metadata": dict, "weight_map": dict[str, str]})
    files = set(index["weight_map"].values())
    for file in files:
        if not file.endswith(".safetensors") or Path(file).name != file:
            raise InputError(f"{folder / INDEX}: weight_map must name .safetensors files beside it, not {file!r}")
    return {name: shape for file in sorted(files) for name, shape in file_shapes(folder / file).items()}


def file_shapes(file: Path) -> Shapes:
    """Of all tensors of a file. Raises InputError, naming the file, if it is missing, damaged or something else."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: {error}") from error


def refuse_other(place: str, found: Shapes, expected: Shapes) -> None:
    """Raises InputError, naming the first few, unless every expected tensor is there in the expected shape."""
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [
        f"{name} has shape {list(found[name])}, expected {list(shape)}"
        for name, shape in sorted(expected.items())
        if found.get(name, shape) != shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise InputError(f"{place}: {'; '.join(problems[:3])}{more}")
