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


@pytest.mark.parametrize("name", ["adapter_config.json", "shard-00000-model-00001-of-00001.safetensors"])
def test_what_transformers_would_read_as_well_is_refused(sharded: Path, name: str) -> None:
    (sharded / name).write_text("{}")
    with pytest.raises(InputError, match=f"not a plain checkpoint, there is {name}"):
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


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"temperature": "hot"}, "generation_config.json: temperature is 'hot'"),
        ({"eos_token_id": [[]]}, "eos_token_id is"),
        ({"max_new_tokens": 10**12}, "max_new_tokens is"),
    ],
)
def test_generation_settings_that_cannot_be(sharded: Path, said: dict[str, Any], message: str) -> None:
    (sharded / "generation_config.json").write_text(json.dumps(said))
    with pytest.raises(InputError, match=message):
        Phi3VForCausalLM.from_pretrained(sharded)


def test_other_generation_settings_are_not_obeyed(sharded: Path) -> None:
    said = {
        "num_beams": 10**9,
        "cache_implementation": "static",
        "compile_config": {},
        "to_dict": 1,
        "temperature": 2.5,
    }
    (sharded / "generation_config.json").write_text(json.dumps(said))
    config = Phi3VForCausalLM.from_pretrained(sharded).generation_config
    assert (config.num_beams or 1, config.cache_implementation, config.temperature) == (1, None, 2.5)
    assert config.eos_token_id == list(Phi3VForCausalLM.from_pretrained(sharded).config.stop_token_ids)
