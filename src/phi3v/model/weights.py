"""Names and shapes of the tensors in safetensors files, read from their headers before any memory is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from phi3v.base.errors import InputError
from phi3v.base.jsonfile import check_values, read_object

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FILES = ("config.json", "generation_config.json", INDEX, "model*.safetensors")

Shapes = Mapping[str, tuple[int, ...]]


def checkpoint_folder(name: str | Path, **hub: Any) -> Path:
    """The folder of a checkpoint. A model on the Hub is downloaded to the cache first; `hub`: revision, token, ..."""
    return Path(name) if Path(name).is_dir() else Path(snapshot_download(str(name), allow_patterns=[*FILES], **hub))


def checkpoint_shapes(folder: Path) -> Shapes:
    """The shapes of all tensors of a checkpoint, in one file or in the files of its index.

    Raises InputError if there is neither, for an index that names anything but safetensors files beside it, and for an
    adapter in the folder, which transformers would load as well.
    """
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{folder}: not a plain checkpoint, there is adapter_config.json")
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
    """The shapes of all tensors of a file. Raises InputError, naming the file, if it is missing or damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: {error}") from error


def check_shapes(place: str, found: Shapes, expected: Shapes) -> None:
    """Raises InputError, naming the first three tensors, unless all expected ones exist with the expected shapes."""
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [
        f"{name} has shape {list(found[name])}, expected {list(shape)}"
        for name, shape in sorted(expected.items())
        if found.get(name, shape) != shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise InputError(f"{place}: {'; '.join(problems[:3])}{more}")
