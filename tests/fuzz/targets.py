"""What is fuzzed, for hypothesis and for atheris: functions of the bytes of one file that may only raise InputError.

A target stands for a file of a *place*, a folder with a model, an adapter, a run and data. Called, it puts the bytes
there, does what our commands do with that file, and puts the honest file back. Besides exceptions it finds messages of
several lines, whatever is written outside the place, programs started, connections made, pickles opened, and code that
runs from a file of the place.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from phi3v.base.errors import MAX_LENGTH, InputError
from phi3v.base.ranks import Ranks
from phi3v.base.runfolder import RunFolder
from phi3v.data.check import check
from phi3v.data.image import hd_size, hd_transform, load_image, read_info, read_size
from phi3v.data.layouts import read
from phi3v.data.layouts.source import Source
from phi3v.data.processor import Phi3VProcessor
from phi3v.data.schema import read_jsonl
from phi3v.model.loading import load_config, load_model
from phi3v.model.phi3v import Phi3VForCausalLM
from phi3v.publish.report import write_report
from phi3v.train.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from phi3v.train.engines import EngineSettings
from phi3v.train.engines.replicated import Replicated

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Target:
    """A file of a place and what is done with it. `seeds` are honest contents besides the file's own."""

    file: str
    use: Callable[[Path], object]
    seeds: Callable[[Path], list[bytes]] = lambda place: []
    header_only: bool = False
    """The bytes are the JSON header of a safetensors file whose tensors stay as they are."""

    def __call__(self, place: Path, content: bytes) -> None:
        file = place / self.file
        honest = file.read_bytes() if file.exists() else None
        if self.header_only:
            assert honest is not None
            content = struct.pack("<Q", len(content)) + content + honest[8 + len(_header(honest)) :]
        file.write_bytes(content)
        try:
            with watched(place), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.use(place)
        except InputError as error:
            message = str(error)
            assert message, "an empty message"
            assert message.isprintable(), f"not one line: {message!r}"
            assert len(message) <= MAX_LENGTH + 10, f"{len(message)} characters"
        finally:
            file.unlink() if honest is None else file.write_bytes(honest)

    def honest(self, place: Path) -> list[bytes]:
        """What the file holds in a place that nobody has tampered with, in all its variations."""
        own = [(place / self.file).read_bytes()] if (place / self.file).exists() else []
        return [_header(content) for content in own] if self.header_only else own + self.seeds(place)


def _header(content: bytes) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + length]


# --- what must not happen ---------------------------------------------------------------------------------------------

FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.spawn")
FORBIDDEN += ("socket.connect", "socket.getaddrinfo", "urllib.Request", "pickle.find_class")
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod")
OURS = {f"phi3v.data.encode.{name}" for name in ("Encoded", "Example", "Turn")}  # what the data set on disk is made of
OURS |= {f"numpy.{core}.numeric._frombuffer" for core in ("_core", "core")} | {"numpy.dtype"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_watching: list[Path] = []
_seen: list[str] = []


@contextlib.contextmanager
def watched(place: Path) -> Iterator[None]:
    """Raises AssertionError if the block, even where somebody catches it, does what a file must not make us do."""
    _install()
    _seen.clear()
    _watching.append(place)
    load, torch.load = torch.load, _forbidden_load
    try:
        yield
    finally:
        torch.load = load
        _watching.pop()
        if _seen:
            raise AssertionError("; ".join(_seen[:3]))


def _forbidden_load(*arguments: Any, **options: Any) -> None:
    _seen.append("torch.load")
    raise AssertionError("torch.load")


@cache
def _install() -> None:
    sys.addaudithook(_audit)  # it stays until the process ends


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    place = str(_watching[-1])
    if event in FORBIDDEN and not (event == "pickle.find_class" and ".".join(arguments) in OURS):
        _seen.append(f"{event} {arguments!r}")
    elif event == "open":
        file, mode, flags = arguments
        writes = (isinstance(flags, int) and flags & WRITING) or (isinstance(mode, str) and set(mode) & set("wax+"))
        unnamed = not isinstance(file, int) and os.path.isdir(file)  # a temporary file, gone when it is closed
        if writes and not unnamed and not _is_harmless(file, place):
            _seen.append(f"open {file!r} {mode} for writing")
    elif event in CHANGES:
        files = [file for file in arguments if isinstance(file, str | bytes)]
        for file, folder in zip(files, arguments[-len(files) :], strict=True):
            start = os.readlink(f"/proc/self/fd/{folder}") if isinstance(folder, int) and folder >= 0 else ""
            if not _is_harmless(os.path.join(start, os.fsdecode(file)), place):
                _seen.append(f"{event} {arguments!r}")
    elif event in ("exec", "compile"):
        name = arguments[0].co_filename if event == "exec" else arguments[1]
        if isinstance(name, str) and name.startswith(place):
            _seen.append(f"{event} of {name}")


def _is_harmless(file: Any, place: str) -> bool:
    if isinstance(file, int):
        return True
    path = os.path.realpath(os.fsdecode(file))
    known = path == os.devnull or "__pycache__" in path or "/torchinductor_" in path  # what Python and torch do anyway
    return known or f"{path}/".startswith(f"{place}/")


# --- what our commands do with a file ---------------------------------------------------------------------------------


def _lines(place: Path) -> None:
    processor = processor_of(place / "model")
    findings = check(place / "data/train.jsonl", None, processor, num_workers=0)
    try:
        read_jsonl(place / "data/train.jsonl")
    except InputError:
        assert not findings.ok, "check passes what training refuses"


@cache
def processor_of(model: Path) -> Phi3VProcessor:
    return Phi3VProcessor.from_pretrained(model)


def _image(place: Path) -> None:
    file = place / "image"
    fit = True
    try:
        picture = read_info(file)
        size = hd_size(*picture.size, 4)
    except InputError:
        fit = False
    if not fit:
        hd_transform(load_image(file), 4)
        raise AssertionError("training reads what check refuses")
    assert read_size(file) == picture.size == load_image(file).size, "the header says another size"
    assert hd_transform(load_image(file), 4).shape == (*size, 3)


def _processor(place: Path) -> None:
    processor = Phi3VProcessor.from_pretrained(place / "model")
    ids = processor.token_ids("<|user|>\nWhat is this? Ünï 図 \t<|end|>\n<|image_1|>\n")
    processor.decode(ids)
    processor.save_pretrained(place / "saved")


def _model(place: Path) -> None:
    model, processor = load_model(place / "model")
    with torch.no_grad():
        model(input_ids=torch.tensor([processor.token_ids("what is this")]))


def _config(place: Path) -> None:
    load_config(place / "model").save_pretrained(place / "saved")
    _model(place)


def _shards(place: Path) -> None:
    Phi3VForCausalLM.from_pretrained(place / "sharded")


def _adapter(place: Path) -> None:
    load_model(place / "adapter")


def _resume(place: Path) -> None:
    newest, _ = newest_checkpoint(place / "checkpoints")
    if newest is not None:
        load_checkpoint(newest, **state())


@cache
def state() -> dict[str, Any]:
    """A small engine that has taken a step, and its schedule."""
    torch.manual_seed(0)
    settings = EngineSettings(make_optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, fused=True))
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    engine = Replicated(model, Ranks(device=torch.device("cpu")), settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(engine.optimizer, lambda step: 1 / (step + 1))
    engine.model(torch.ones(1, 2)).sum().backward()
    engine.step()
    schedule.step()
    return {"engine": engine, "schedule": schedule}


def _claim(place: Path) -> None:
    """Whoever goes on with a run compares its settings and its data with those of the folder."""
    run = RunFolder(place / "run").config
    RunFolder(place / "begun").claim(replace(run, keeping=replace(run.keeping, out=place / "begun", resume="auto")))


def _convert(format: Any, place: Path) -> None:
    source = Source(path=place / f"{format}.json", root=place / "data/images", put=lambda content: "")
    list(read(format, source, place))


LLAVA = json.dumps(
    [
        {
            "id": "1",
            "image": "red.png",
            "conversations": [{"from": "human", "value": "<image>\na"}, {"from": "gpt", "value": "b"}],
        }
    ]
).encode()
MESSAGES = json.dumps(
    {
        "id": "1",
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "red.png"}, {"type": "text", "text": "a"}]},
            {"role": "assistant", "content": "b"},
        ],
    }
).encode()
VQA = b"""{"questions": [{"question_id": 1, "image_id": 1, "question": "a"}],
    "images": [{"id": 1, "file_name": "red.png"}]}"""
LABEL_STUDIO = b"""[{"id": 1, "data": {"image": "/data/red.png", "question": "a"}, "annotations":
    [{"result": [{"type": "choices", "value": {"choices": ["b"]}}]}]}]"""

TARGETS = {
    "lines": Target("data/train.jsonl", _lines),
    "image": Target("image", _image, seeds=lambda place: image_seeds()),
    "config": Target("model/config.json", _config),
    "preprocessor": Target("model/preprocessor_config.json", _processor),
    "tokenizer": Target("model/tokenizer.json", _processor),
    "tokenizer_config": Target("model/tokenizer_config.json", _processor),
    "weights": Target("model/model.safetensors", _model, header_only=True),
    "index": Target("sharded/model.safetensors.index.json", _shards),
    "adapter_config": Target("adapter/adapter_config.json", _adapter),
    "adapter_weights": Target("adapter/adapter_model.safetensors", _adapter, header_only=True),
    "quantization": Target("adapter/quantization.json", _adapter, seeds=lambda place: [b'{"bits": 4}']),
    "manifest": Target("checkpoints/step-000001/manifest.json", _resume),
    "state": Target("checkpoints/step-000001/state.json", _resume),
    "slices": Target("checkpoints/step-000001/rank-00000-of-00001.safetensors", _resume, header_only=True),
    "run": Target("begun/config.json", _claim),
    "environment": Target("begun/environment.json", _claim),
    "log": Target("run/log.jsonl", lambda place: write_report(place / "run")),
    "metrics": Target("run/metrics.json", lambda place: write_report(place / "run")),
    "environment in a report": Target("run/environment.json", lambda place: write_report(place / "run")),
    "lengths": Target("run/lengths.json", lambda place: write_report(place / "run")),
    "predictions": Target("run/predictions.jsonl", lambda place: write_report(place / "run")),
    "llava": Target("llava.json", partial(_convert, "llava"), seeds=lambda place: [LLAVA]),
    "messages": Target("messages.json", partial(_convert, "messages"), seeds=lambda place: [MESSAGES]),
    "vqa": Target("vqa.json", partial(_convert, "vqa"), seeds=lambda place: [VQA]),
    "label-studio": Target("label-studio.json", partial(_convert, "label-studio"), seeds=lambda place: [LABEL_STUDIO]),
    "csv": Target("csv.json", partial(_convert, "csv"), seeds=lambda place: [b"image,question,answer\nred.png,a,b\n"]),
}


# --- a place, and honest files ----------------------------------------------------------------------------------------


def make_place(place: Path, *, model: Path, run: Path, data: Path) -> Path:
    """A place with copies of a model folder, the folder of a finished LoRA run on it, and of a data file's folder."""
    shutil.copytree(model, place / "model")
    shutil.copytree(run, place / "run")
    shutil.copytree(run, place / "begun", ignore=shutil.ignore_patterns("metrics.json", "final"))
    shutil.copytree(run / "final", place / "adapter")
    shutil.copytree(data.parent, place / "data")
    config = json.loads((place / "adapter/adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(place / "model")
    (place / "adapter/adapter_config.json").write_text(json.dumps(config))
    Phi3VForCausalLM.from_pretrained(model).save_pretrained(place / "sharded", max_shard_size="100KB")
    save_checkpoint(place / "checkpoints", 1, **state())
    return place


@cache
def image_seeds() -> list[bytes]:
    """Small pictures of every format and of the modes and variations that it has."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 4), dtype=np.uint8)
    rgba, grey = Image.fromarray(noise), Image.fromarray(noise[..., 0])
    rgb, palette = rgba.convert("RGB"), rgba.convert("RGB").convert("P")
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    turned = Image.Exif()
    turned[0x0112] = 6
    frames: dict[str, Any] = {"save_all": True, "append_images": [grey.rotate(180)]}
    pictures: list[tuple[Image.Image, str, dict[str, Any]]] = [
        *((image, "PNG", {}) for image in (rgba, rgb, grey, palette, deep, grey.convert("1"), grey.convert("LA"))),
        *((image, "PNG", options) for image, options in ((palette, {"transparency": b"\0\x7f"}), (grey, frames))),
        *((image, "JPEG", {}) for image in (rgb, grey, rgb.convert("CMYK"))),
        *((rgb, "JPEG", options) for options in ({"progressive": True}, {"exif": turned}, {"subsampling": 2})),
        *(
            (image, "GIF", options)
            for image, options in ((palette, {}), (palette, {"transparency": 1}), (grey, frames))
        ),
        *((rgba, "WEBP", options) for options in ({}, {"lossless": True}, {"exif": turned}, frames)),
        *((image, "BMP", {}) for image in (rgb, rgba, grey, palette, grey.convert("1"))),
        *((image, "TIFF", {}) for image in (rgb, rgba, grey, deep, rgb.convert("CMYK"), rgb.convert("LAB"))),
        *((grey.convert("F"), "TIFF", {}), (rgb, "TIFF", {"exif": turned}), (grey, "TIFF", frames)),
        *((rgb, "TIFF", {"compression": kind}) for kind in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg")),
        *((image, "PPM", {}) for image in (rgb, grey, grey.convert("1"), grey.convert("F"))),
        *((rgb, "AVIF", options) for options in ({"quality": 30}, {"exif": turned})),
    ]
    return [_saved(image, format, options) for image, format, options in pictures]


def _saved(image: Image.Image, format: str, options: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()
