"""Code planted where we read: pickles, and the remote code that published checkpoints name. None of it ever runs."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from targets import watched
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from phi3v.base.config import Base, Data, Evaluation, Keeping, Optim, Run, Tuning
from phi3v.base.errors import InputError
from phi3v.base.runfolder import RunFolder
from phi3v.data.check import check
from phi3v.data.processor import Phi3VProcessor
from phi3v.infer.chat import chat
from phi3v.infer.evaluate import evaluate
from phi3v.model.loading import load_config, load_model
from phi3v.publish.look import look
from phi3v.publish.merge import merge
from phi3v.publish.report import write_report
from phi3v.train.checkpoint import newest_checkpoint
from phi3v.train.loop import train

PICKLES = (
    *("pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "adapter_model.bin", "training_args.bin", "tf_model.h5"),
    *("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "random_states_0.pkl", "model.pt"),
    *("tokenizer.pkl", "weights.npy", "weights.npz", ".metadata", "consolidated.00.pth", "data.pkl", "config.pkl"),
    *("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "vocab.pkl", "state.pkl"),
)
MODULES = (
    *("modeling_phi3_v.py", "configuration_phi3_v.py", "processing_phi3_v.py", "image_processing_phi3_v.py"),
    *("image_embedding_phi3_v.py", "tokenization_phi3_v.py", "custom_generate/generate.py", "__init__.py", "evil.py"),
)
AUTO_MAP = {
    "AutoConfig": "configuration_phi3_v.Phi3VConfig",
    "AutoModel": "modeling_phi3_v.Phi3VModel",
    "AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM",
    "AutoModelForImageTextToText": "modeling_phi3_v.Phi3VForCausalLM",
    "AutoTokenizer": ["tokenization_phi3_v.Tokenizer", "tokenization_phi3_v.Tokenizer"],
    "AutoProcessor": "processing_phi3_v.Phi3VProcessor",
    "AutoImageProcessor": "processing_phi3_v.Phi3VImageProcessor",
}


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, (str(self.marker),)


@pytest.fixture(scope="module")
def marker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("planted") / "executed"


@pytest.fixture(scope="module")
def planted(place: Path, marker: Path) -> Path:
    """A copy of the place with pickles and modules in every folder, named by every file that can name them."""
    copy = marker.parent / "place"
    shutil.copytree(place, copy)
    for folder in (copy / "model", copy / "adapter", copy / "run", copy / "run/final", copy / "data"):
        plant(folder, marker)
    for folder in (copy / "run/checkpoints").iterdir():
        plant(folder, marker)
    extend(copy / "adapter/adapter_config.json", base_model_name_or_path=str(copy / "model"))
    extend(copy / "run/final/adapter_config.json", base_model_name_or_path=str(copy / "model"))
    return copy


def plant(folder: Path, marker: Path) -> None:
    for name in PICKLES:
        file = folder / name
        match file.suffix:
            case ".npy":
                np.save(file, np.array([Payload(marker)], dtype=object), allow_pickle=True)
            case ".npz":
                np.savez(file, np.array([Payload(marker)], dtype=object))
            case ".pt" | ".bin" | ".pth":
                torch.save({"weight": Payload(marker)}, file)
            case _:
                file.write_bytes(pickle.dumps(Payload(marker)))
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}})
    )
    for name in MODULES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"import os\nos.mknod({str(marker)!r})\n")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        if (folder / name).exists() and "base" not in json.loads((folder / name).read_text()):  # a run's is our own
            extend(folder / name, auto_map=AUTO_MAP, custom_pipelines={"x": {"impl": "evil.Evil", "pt": ["Evil"]}})
    if (folder / "generation_config.json").exists():
        extend(folder / "generation_config.json", custom_generate="custom_generate", trust_remote_code=True)
    if (folder / "adapter_config.json").exists():
        extend(folder / "adapter_config.json", auto_mapping={"parent_library": "evil", "base_model_class": "Evil"})


def extend(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def settings(place: Path, **flags: Any) -> Run:
    """Those of the run in the place, which has ended, with three steps instead of two."""
    return Run(
        base=Base(model=str(place / "model"), dtype="fp32"),
        data=Data(train=place / "data/train.jsonl", batch_size=4, num_workers=0),
        tuning=Tuning(lora=True, lora_rank=4),
        optim=Optim(max_steps=2, warmup_steps=0),
        evaluation=Evaluation(max_new_tokens=2, eval_before=False),
        keeping=Keeping(progress=False, **flags),
    )


def resume(place: Path) -> None:
    """A run that was killed after its checkpoint, before it wrote anything else."""
    train(settings(place, out=place / "killed"))
    plant(place / "killed/checkpoints/step-000002", place.parent / "executed")
    plant(place / "killed", place.parent / "executed")
    (place / "killed/metrics.json").unlink()
    shutil.rmtree(place / "killed/final")
    train(settings(place, out=place / "killed", resume="auto"))
    assert (place / "killed/metrics.json").exists()


def auto_classes(place: Path) -> None:
    """After `import phi3v` those of transformers load our architecture; whoever wants remote code must say so."""
    for auto in (AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText):
        auto.from_pretrained(place / "model")
    for auto in (AutoTokenizer, AutoProcessor):
        with contextlib.suppress(ValueError, OSError):  # transformers has none for a phi3_v without its remote code
            auto.from_pretrained(place / "model")


ENTRIES: dict[str, Callable[[Path], object]] = {
    "load_model": lambda place: load_model(place / "model"),
    "load_config": lambda place: load_config(place / "model"),
    "processor": lambda place: Phi3VProcessor.from_pretrained(place / "model").save_pretrained(place / "saved"),
    "auto classes": auto_classes,
    "adapter": lambda place: load_model(place / "adapter"),
    "merge": lambda place: merge(str(place / "adapter"), out=place / "merged"),
    "evaluate": lambda place: evaluate(
        str(place / "run"), data=place / "data/train.jsonl", limit=1, max_new_tokens=2, progress=False
    ),
    "chat": lambda place: chat(str(place / "model"), "what is this", max_new_tokens=2),
    "train": lambda place: train(settings(place, out=place / "new")),
    "resume": resume,
    "checkpoints": lambda place: newest_checkpoint(place / "run/checkpoints"),
    "load_run": lambda place: RunFolder(place / "run").config,
    "report": lambda place: write_report(place / "run"),
    "look": lambda place: look(place / "data/train.jsonl", model=str(place / "model"), num_workers=0),
    "check": lambda place: check(place / "data/train.jsonl", num_workers=0),
}


def test_the_payload_works(planted: Path, marker: Path) -> None:
    pickle.loads((planted / "model/data.pkl").read_bytes())
    assert marker.exists()
    marker.unlink()
    np.load(planted / "model/weights.npy", allow_pickle=True)
    assert marker.exists()
    marker.unlink()
    torch.load(planted / "model/pytorch_model.bin", weights_only=False)
    assert marker.exists()
    marker.unlink()


def test_the_watch_sees_what_it_must(planted: Path, marker: Path) -> None:
    with pytest.raises(AssertionError, match=r"pickle.find_class"), watched(planted):
        pickle.loads((planted / "model/data.pkl").read_bytes())
    with pytest.raises(AssertionError, match=r"torch.load"), watched(planted):
        torch.load(planted / "model/pytorch_model.bin")
    with pytest.raises(AssertionError, match=r"exec of .*evil.py"), watched(planted):
        exec(compile("1", str(planted / "model/evil.py"), "exec"))
    with pytest.raises(AssertionError, match="for writing"), watched(planted):
        (planted.parent / "outside").write_text("")
    marker.unlink()


@pytest.mark.parametrize("entry", ENTRIES)
def test_planted_code_never_runs(entry: str, planted: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phi3v.base.hardware._commit", lambda: None)  # starts git, but for no file's sake
    with watched(planted):
        ENTRIES[entry](planted)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["model/model.safetensors", "adapter/adapter_model.safetensors"])
@pytest.mark.parametrize("kind", ["gone", "pickle", "torch"])
def test_a_pickle_is_no_way_out(name: str, kind: str, planted: Path, marker: Path, tmp_path: Path) -> None:
    """Weights that are missing, or that are a pickle under the right name, are not looked for elsewhere."""
    file = tmp_path / Path(name).name
    shutil.copytree(planted / Path(name).parent, tmp_path, dirs_exist_ok=True)
    file.unlink()
    if kind == "pickle":
        file.write_bytes(pickle.dumps(Payload(marker)))
    elif kind == "torch":
        torch.save(Payload(marker), file)
    with watched(tmp_path), pytest.raises(InputError, match=rf"{file.name}|no file named"):
        load_model(tmp_path)
    with watched(tmp_path), pytest.raises((InputError, OSError, SafetensorError)):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not marker.exists()


def test_an_index_cannot_point_at_a_pickle(planted: Path, marker: Path, tmp_path: Path) -> None:
    shutil.copytree(planted / "model", tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with watched(tmp_path), pytest.raises(InputError, match=r"not 'pytorch_model.bin'"):
        load_model(tmp_path)
    assert not marker.exists()
