"""Adapters: what their file holds, that they come back, and that merging changes nothing but the form."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from phi3v.base.config import Run
from phi3v.base.errors import InputError
from phi3v.infer.answering import Loading
from phi3v.infer.chat import chat
from phi3v.infer.demo import load_speakers
from phi3v.infer.evaluate import evaluate
from phi3v.infer.predict import predict
from phi3v.model import Phi3VForCausalLM
from phi3v.model.loading import load_model, save_model
from phi3v.model.parts import add_lora
from phi3v.model.quantization import Quantization, quantize
from phi3v.publish import merge as room
from phi3v.publish.export import export
from phi3v.publish.merge import merge
from phi3v.train.loop import train


def logits(model: Any, processor: Any) -> torch.Tensor:
    inputs = processor(
        "<|user|>\n<|image_1|>\nwhat is the color<|end|>\n<|assistant|>\nred", [Image.new("RGB", (40, 40), "red")]
    )
    with torch.no_grad():
        return model.eval()(**inputs).logits


def test_the_adapter_file_holds_adapters_only(lora_run: Path) -> None:
    final = lora_run / "final"
    names = {file.name for file in final.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= names
    assert not names & {"README.md", "model.safetensors", "config.json"}
    with safe_open(final / "adapter_model.safetensors", "pt") as file:
        keys = list(file.keys())
    assert all(".lora_A." in key or ".lora_B." in key for key in keys)
    assert any("lm_head.lora_A" in key for key in keys)


@pytest.mark.parametrize(
    "kind",
    [{}, {"dora": True}, {"rslora": True}, {"lora_init": "pissa"}, {"lora_init": "olora"}, {"lora_init": "default"}],
)
def test_a_saved_adapter_on_its_base_is_the_trained_model_and_so_is_the_merged_one(
    kind: dict, settings_for: Callable[..., Run], tmp_path: Path, monkeypatch
) -> None:
    import phi3v.train.loop as trainer

    kept = {}
    save = trainer.save_model

    def keep(model: Any, *arguments: Any, **named: Any) -> None:
        kept["model"] = model
        save(model, *arguments, **named)

    monkeypatch.setattr(trainer, "save_model", keep)
    train(run := settings_for(lora=True, lora_rank=4, max_steps=3, warmup_steps=0, learning_rate=1e-2, **kind))
    adapted, processor = load_model(run.keeping.out / "final")
    trained = logits(kept["model"], processor)
    base, _ = load_model(run.base.model)
    assert (trained - logits(base, processor)).norm() / trained.norm() > 0.05  # it has learnt something
    torch.testing.assert_close(logits(adapted, processor), trained, rtol=1e-5, atol=1e-5)

    merge(str(run.keeping.out), out=tmp_path / "merged")
    plain, processor = load_model(tmp_path / "merged")
    assert type(plain) is Phi3VForCausalLM
    assert (logits(plain, processor) - trained).norm() / trained.norm() < 1e-5


def test_a_merged_model_is_a_published_checkpoint(lora_run: Path, tiny_model_dir: Path, tmp_path: Path, capsys) -> None:
    out = merge(str(lora_run / "final"), out=tmp_path / "merged")  # an adapter folder will do
    ours, base = load_file(out / "model.safetensors"), load_file(tiny_model_dir / "model.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in ours.items()} == {
        name: (t.shape, t.dtype) for name, t in base.items()
    }
    assert {file.name for file in out.iterdir()} == {file.name for file in tiny_model_dir.iterdir()}
    said = capsys.readouterr().out
    assert "merging changed the logits by" in said
    assert "quantized" not in said
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_adapter_of_a_quantized_base_goes_into_the_whole_one(
    dtype: torch.dtype, tiny_checkpoint_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("bitsandbytes", reason="needs pip install 'phi3v[qlora]'")
    base, processor = load_model(tiny_checkpoint_dir, dtype=dtype)
    save_model(base, processor, tmp_path / "base")
    model, _ = load_model(tmp_path / "base")
    quantize(model, Quantization(parts=("vision",)), compute_dtype=torch.float32)
    kind = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "init": "gaussian", "dora": False, "rslora": False}
    model = add_lora(model, frozen=("projector",), **kind)
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for p in adapters.values():
        torch.nn.init.normal_(p, std=0.1)
    save_model(model, processor, tmp_path / "adapter")

    out = merge(str(tmp_path / "adapter"), out=tmp_path / "merged")
    whole, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    assert {name: t.dtype for name, t in merged.items()} == {name: t.dtype for name, t in whole.items()}
    assert not (out / "quantization.json").exists()
    changed = {name for name in whole if not torch.equal(whole[name], merged[name])}
    assert len(changed) == len(adapters) / 2 == 2 * 4 + 2 * 6 + 1
    for name in changed:
        a, b = (adapters[f"base_model.model.{name[:-7]}.lora_{half}.default.weight"].detach() for half in "AB")
        torch.testing.assert_close(merged[name], (whole[name].float() + 2 * b @ a).to(dtype), rtol=0, atol=1e-6)

    plain, _ = load_model(out, dtype=torch.float32)
    trained, _ = load_model(tmp_path / "adapter", dtype=torch.float32)
    expected = room.distance(
        room.probe(plain, processor, torch.device("cpu")), room.probe(trained, processor, torch.device("cpu"))
    )
    assert expected > 0.05
    said = capsys.readouterr().out
    assert f"its logits differ by {expected:.1e} (relative) from the trained model's" in said
    assert "merging changed the logits by" in said


def test_what_cannot_be_merged_is_refused(lora_run: Path, finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no adapter to merge"):
        merge(str(finished_run), out=tmp_path / "merged")
    existing = tmp_path / "existing"
    existing.mkdir()
    (existing / "precious").write_text("")
    with pytest.raises(InputError, match=r"--out .*existing exists already"):
        merge(str(lora_run), out=existing)
    assert [file.name for file in tmp_path.rglob("*")] == ["existing", "precious"]


def test_a_merge_that_changed_the_model_is_not_written(lora_run: Path, tmp_path: Path, monkeypatch) -> None:
    probe, calls = room.probe, []

    def off(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return probe(*arguments) * (1 if len(calls) == 1 else 1.01)

    monkeypatch.setattr(room, "probe", off)
    with pytest.raises(InputError, match=r"merging changed the logits by 1\.0e-02; nothing was written"):
        merge(str(lora_run), out=tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_whose_base_is_gone_says_so(lora_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(lora_run / "final", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(tmp_path / "gone")})
    )
    with pytest.raises(
        InputError,
        match=r"adapter: the adapter's base model cannot be loaded: .*gone: no such model folder \(--base DIR\)",
    ):
        merge(str(folder), out=tmp_path / "merged")


def test_a_base_that_has_moved_is_named_and_another_is_refused(
    lora_run: Path, tiny_model_dir: Path, tiny_data: Path, changed_model, tmp_path: Path
) -> None:
    """By every command that loads an adapter."""
    run = tmp_path / "run"
    shutil.copytree(lora_run, run)
    shutil.copytree(tiny_model_dir, moved := tmp_path / "moved")
    file = run / "final/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(tmp_path / "gone")}))
    other = str(changed_model(tensors={"lm_head.weight": torch.zeros(432, 32)}))
    loading = {base: Loading(base=base) for base in (str(moved), other)}
    commands = {
        "merge": lambda base, out: merge(str(run), out=out, base=base),
        "export": lambda base, out: export(str(run), out=out, base=base),
        "evaluate": lambda base, out: evaluate(str(run), data=tiny_data, out=out, limit=1, loading=loading[base]),
        "predict": lambda base, out: predict(str(run), tiny_data, out=out, limit=1, loading=loading[base]),
        "chat": lambda base, out: chat(str(run), "what", max_new_tokens=1, loading=loading[base]),
        "demo": lambda base, out: load_speakers(str(run), "base", loading[base]),
    }
    for name, command in commands.items():
        command(str(moved), tmp_path / name)
        with pytest.raises(InputError, match=r"--base .*changed_model is not the model that .*run was trained on"):
            command(other, tmp_path / f"{name} with another")
    merged, expected = merge(str(lora_run), out=tmp_path / "expected"), tmp_path / "merge"
    assert (merged / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"--base .*moved has no effect: .*merge is no adapter"):
        evaluate(str(tmp_path / "merge"), data=tiny_data, out=tmp_path / "whole", loading=loading[str(moved)])
