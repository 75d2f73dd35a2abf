"""A config.json from anywhere: obeyed where it makes sense, refused by name where it does not, and never lost."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from phi3v.base.errors import InputError
from phi3v.model import Phi3VConfig
from phi3v.model.loading import load_config


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text((tiny_model_dir / "config.json").read_text())
    return tmp_path


def change(folder: Path, **values: Any) -> dict[str, Any]:
    content = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(content))
    return content


def test_unknown_keys_are_kept_and_never_obeyed(folder: Path, tmp_path: Path) -> None:
    strange = {
        "attn_implementation": "someone/kernel",
        "_attn_implementation": "someone/kernel",
        "quantization_config": {"quant_method": "bitsandbytes", "dtype": 5},
        "transformers_weights": "../elsewhere.safetensors",
        "per_layer_config": {"0": {"hidden_size": 7}},
        "num_labels": 10**9,
        "to_dict": 1,
        "head_dim": 7,
        "clip": {},
        "_check": None,
    }
    said = change(folder, **strange)
    config = load_config(folder)
    assert config._attn_implementation is None
    assert not {"quantization_config", "transformers_weights"} & vars(config).keys()
    assert config.head_dim == 16
    config.save_pretrained(tmp_path / "saved")
    kept = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert {key: kept.get(key) for key in strange} == strange
    assert {key for key, value in said.items() if kept.get(key) != value} <= {"transformers_version"}
    assert load_config(tmp_path / "saved").foreign == config.foreign


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llama"}, "config.json: model_type is 'llama', it must be phi3_v"),
        ({"model_type": ["phi3_v"]}, "model_type is"),
        ({"torch_dtype": "hub"}, "dtype is 'hub', it must be one of float32, bfloat16, float16"),
        ({"dtype": []}, "dtype is []"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, it must be"),
        ({"hidden_size": 2**40}, "hidden_size is 1099511627776"),
        ({"hidden_size": 32.0}, "hidden_size is 32.0"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"num_attention_heads": -1}, "num_attention_heads is -1"),
        ({"hidden_size": 6, "num_attention_heads": 2}, "6 is not a multiple of twice num_attention_heads (4)"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads (3)"),
        ({"original_max_position_embeddings": 1}, "it must be"),
        ({"sliding_window": "x"}, "sliding_window is 'x', it must be"),
        ({"rms_norm_eps": float("nan")}, "not JSON: invalid character"),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
        ({"attention_dropout": 1}, "attention_dropout is 1, it must be"),
        ({"use_cache": "yes"}, "use_cache is 'yes', it must be true or false"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id is"),
        ({"stop_token_ids": 7}, "stop_token_ids is 7"),
        ({"rope_scaling": [1]}, "rope_scaling is [1], it must be an object or null"),
        ({"embd_layer": "x"}, "embd_layer is 'x'"),
        ({"auto_map": 7}, "auto_map is 7"),
        ({"vision_config": 7}, "vision_config is 7"),
        ({"vision_config": "x", "img_processor": None}, "vision_config is 'x'"),
        ({"vision_config": {"num_hidden_layers": 1}}, "vision_config.num_hidden_layers is 1"),
        ({"vision_config": {"num_channels": 1}}, "vision_config.num_channels is 1, it must be 3"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', it must be silu"),
        ({"embd_layer": {"hd_transform_order": "glb_sub"}}, "embd_layer.hd_transform_order is 'glb_sub'"),
        ({"vision_config": {"hidden_size": 30, "num_attention_heads": 4}}, "vision_config.hidden_size"),
        (
            {"rope_scaling": {"type": "su", "short_factor": [1.0] * 7 + [0], "long_factor": [1.0] * 8}},
            "rope_scaling.short_factor is",
        ),
    ],
)
def test_values_that_cannot_be(folder: Path, values: dict[str, Any], message: str) -> None:
    change(folder, **values)
    with pytest.raises(InputError) as error:
        load_config(folder)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"7", b"[]", b"\xff", b"{", b'{"a": ' + b"[" * 9999, b'{"a": 1' + b"0" * 5000]
)
def test_what_is_no_object_is_refused_by_the_name_of_the_file(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config.json: "):
        load_config(folder)


def test_dtypes_of_the_file_and_of_the_caller(folder: Path) -> None:
    change(folder, torch_dtype="float16", dtype=None)
    assert Phi3VConfig.from_pretrained(folder, attn_implementation="eager")._attn_implementation == "eager"
    assert Phi3VConfig(dtype="bfloat16").dtype is torch.bfloat16
