"""A checkpoint is looked at before it is loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from phi3v.base.errors import InputError
from phi3v.model import Phi3VForCausalLM
from phi3v.model.weights import INDEX, WHOLE, checkpoint_shapes, file_shapes


@pytest.fixture
def sharded(tiny_model_dir: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    Phi3VForCausalLM.from_pretrained(tiny_model_dir).save_pretrained(folder, max_shard_size="100KB")
    return folder


def test_shapes_of_one_file_and_of_several(tiny_model_dir: Path, sharded: Path) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tiny_model_dir / WHOLE).items()}
    assert checkpoint_shapes(tiny_model_dir) == shapes
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert checkpoint_shapes(sharded) == shapes


@pytest.mark.parametrize(
    "weight_map",
    [
        None,
        7,
        ["model.safetensors"],
        {"a": 7},
        {"a": []},
        {"a": "pytorch_model.bin"},
        {"a": "../sharded/x.safetensors"},
        {"a": "/x.safetensors"},
    ],
)
def test_an_index_names_safetensors_beside_it(sharded: Path, weight_map: Any) -> None:
    (sharded / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(InputError, match=f"{INDEX}: weight_map (is|must name .safetensors files beside it, not)"):
        Phi3VForCausalLM.from_pretrained(sharded)
    (sharded / INDEX).write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(InputError, match=f"{INDEX}: metadata is None, it must be an object"):
        Phi3VForCausalLM.from_pretrained(sharded)


def test_missing_shards_and_damaged_headers_are_named(sharded: Path) -> None:
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    content = first.read_bytes()
    for damaged in (b"", content[:7], content[:100], content[:-1], b"\xff" * 16, b"PK\3\4" + content):
        first.write_bytes(damaged)
        with pytest.raises(InputError, match=first.name):
            file_shapes(first)
    first.write_bytes(content)
    second.unlink()
    with pytest.raises(InputError, match=f"{second.name}: No such file"):
        Phi3VForCausalLM.from_pretrained(sharded)


def test_an_adapter_beside_the_weights_is_refused(sharded: Path) -> None:
    """transformers would load it as well, a pickle too."""
    (sharded / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="not a plain checkpoint, there is adapter_config"):
        Phi3VForCausalLM.from_pretrained(sharded)


def test_a_small_file_cannot_ask_for_a_huge_model(tiny_model_dir: Path, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "huge"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    huge = {"hidden_size": 65536, "intermediate_size": 262144, "num_hidden_layers": 1024, "rope_scaling": None}
    (folder / "config.json").write_text(json.dumps(config | huge))
    save_file({"x": torch.zeros(1)}, folder / WHOLE)
    made = []
    monkeypatch.setattr(torch, "empty_like", lambda *arguments, **options: made.append(arguments))
    with pytest.raises(InputError, match=r"lm_head.weight is missing; .* \(and \d+ more\)"):
        Phi3VForCausalLM.from_pretrained(folder)
    assert not made  # no room was made for what is missing (by transformers, with this function)


@pytest.fixture
def hub(sharded: Path, tmp_path: Path) -> dict[str, Any]:
    """A cache into which owner/name was downloaded, as arguments of from_pretrained."""
    cached = tmp_path / "cache/models--owner--name"
    shutil.copytree(sharded, cached / "snapshots/0123")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("0123")
    return {"cache_dir": tmp_path / "cache", "local_files_only": True}


def test_a_model_of_the_hub_is_checked_as_well(hub: dict[str, Any]) -> None:
    model, info = Phi3VForCausalLM.from_pretrained("owner/name", **hub, output_loading_info=True)
    assert not info["missing_keys"]
    assert model.name_or_path == "owner/name"
    assert model.generation_config.eos_token_id == list(model.config.stop_token_ids)
    shard = max((hub["cache_dir"] / "models--owner--name/snapshots/0123").glob("*.safetensors"))
    tensors = load_file(shard)
    name, _ = tensors.popitem()
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"checkpoint owner/name: {name} is missing"):
        Phi3VForCausalLM.from_pretrained("owner/name", **hub)


def test_generation_settings_of_the_file_count_but_for_where_answers_end(sharded: Path) -> None:
    said = json.loads((sharded / "generation_config.json").read_text())
    (sharded / "generation_config.json").write_text(json.dumps(said | {"temperature": 2.5, "eos_token_id": 2}))
    model = Phi3VForCausalLM.from_pretrained(sharded)
    assert model.generation_config.temperature == 2.5
    assert model.generation_config.eos_token_id == list(model.config.stop_token_ids)
