"""An adapter's folder is obeyed where it describes a LoRA adapter, and refused by name where it does not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from phi3v.base.errors import InputError
from phi3v.model.adapter import CONFIG, WEIGHTS, read_adapter_config
from phi3v.model.loading import load_model


@pytest.fixture
def folder(lora_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(lora_run / "final", tmp_path / "adapter")
    return tmp_path / "adapter"


def change(folder: Path, **settings: Any) -> None:
    content = json.loads((folder / CONFIG).read_text()) | settings
    (folder / CONFIG).write_text(json.dumps(content))


def change_tensors(folder: Path, tensors: dict[str, torch.Tensor | None]) -> None:
    changed = load_file(folder / WEIGHTS) | tensors
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "XLORA"}, "peft_type is 'XLORA', it must be LORA"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is None"),
        ({"base_model_name_or_path": ""}, "base_model_name_or_path is ''"),
        ({"base_model_name_or_path": "a\0b"}, "base_model_name_or_path is"),
        ({"base_model_name_or_path": "x" * 300}, "base_model_name_or_path is"),
        ({"base_model_name_or_path": "/nowhere/at/all"}, "base model cannot be loaded: /nowhere/at/all: no such"),
        ({"r": "4"}, "r is '4', it must be"),
        ({"r": 5000}, "its rank is 5000, but the tensors in adapter_model.safetensors have 4"),
        ({"rank_pattern": {"lm_head": 5000}}, "its rank is 5000"),
        ({"r": 2}, "has shape [4, 32], expected [2, 32]"),
        ({"rank_pattern": {"lm_head": []}}, "rank_pattern is"),
        ({"target_modules": None}, "target_modules is None"),
        ({"target_modules": [7]}, "target_modules is [7]"),
        ({"target_modules": ["nothing"]}, "Target modules {'nothing'} not found"),
        ({"target_modules": "("}, "missing ), unterminated subpattern"),
        ({"init_lora_weights": "eva"}, "init_lora_weights is 'eva'"),
        ({"lora_dropout": 7}, "lora_dropout is 7"),
        ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "megatron_config is {'a': 1}, which is not supported"),
        ({"megatron_core": "evil"}, "megatron_core is 'evil', which is not supported"),
        ({"layer_replication": [[0, 10**9]]}, "layer_replication is [[0, 1000000000]], which is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head'], which is not supported"),
        ({"bias": "all"}, "bias is 'all', which is not supported"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is [1], which is not supported"),
    ],
)
def test_settings_that_make_no_adapter_of_ours(folder: Path, settings: dict[str, Any], message: str) -> None:
    change(folder, **settings)
    with pytest.raises(InputError) as error:
        load_model(folder)
    assert message in str(error.value)


def test_settings_without_effect(folder: Path) -> None:
    change(folder, auto_mapping={"parent_library": "evil", "base_model_class": "Evil"}, of_the_future=[1], revision="x")
    assert "auto_mapping" not in read_adapter_config(folder)
    assert load_model(folder)[0].peft_config["default"].auto_mapping is None


def test_a_base_is_a_whole_model(folder: Path) -> None:
    change(folder, base_model_name_or_path=str(folder))
    with pytest.raises(InputError, match=r"cannot be loaded: .*adapter is an adapter itself"):
        load_model(folder)


def test_the_tensors_are_those_that_the_settings_ask_for(folder: Path) -> None:
    name = "base_model.model.lm_head.lora_B.weight"
    kept = load_file(folder / WEIGHTS)[name]
    for tensors, message in (
        ({name: None}, f"{name} is missing"),
        ({name: torch.zeros(3, 4)}, rf"{name} has shape \[3, 4\], expected \[432, 4\]"),
        (
            {name: kept, "base_model.model.lm_head.weight": torch.zeros(432, 32)},
            "lm_head.weight does not belong to this adapter",
        ),
    ):
        change_tensors(folder, tensors)
        with pytest.raises(InputError, match=message):
            load_model(folder)
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(InputError, match=rf"{WEIGHTS}: No such file"):
        load_model(folder)
