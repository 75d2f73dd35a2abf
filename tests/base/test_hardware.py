"""Device, precision and the facts a run keeps about its surroundings."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import pytest
import torch

import phi3v
from phi3v.base.errors import InputError
from phi3v.base.hardware import environment, name_of, peak_memory_gb, pick_dtype, pick_tokens_per_pack
from phi3v.model.backend import pick_attention

CPU = torch.device("cpu")


def test_what_is_asked_for_is_taken() -> None:
    for device in (CPU, torch.device("cuda")):
        assert [pick_dtype(name, device) for name in ("bf16", "fp16", "fp32")] == [
            *(torch.bfloat16, torch.float16, torch.float32)
        ]


def test_a_pack_holds_what_is_asked_for_or_what_suits_the_device() -> None:
    gpu = torch.device("cuda")
    assert [pick_tokens_per_pack(100, device) for device in (CPU, gpu)] == [100, 100]
    assert [pick_tokens_per_pack(None, device) for device in (CPU, gpu)] == [4096, 8192]


@pytest.mark.parametrize(("amx", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bf16_only_where_a_cpu_computes_it(amx: bool, expected: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert pick_dtype("auto", CPU) == expected
    assert pick_dtype("fp32", CPU) == torch.float32


@pytest.mark.parametrize(("bf16", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_on_cuda_is_bf16_where_the_card_computes_it(bf16: bool, expected: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert pick_dtype("auto", torch.device("cuda")) == expected


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "built", "missing"),
    [
        ("cuda", torch.bfloat16, (9, 0), True, None),
        ("cuda", torch.float16, (8, 0), True, None),
        ("cuda", torch.float32, (9, 0), True, "bf16 and fp16 only"),
        ("cuda", torch.float16, (7, 5), True, "Ampere"),
        ("cuda", torch.float16, (8, 0), False, "built without it"),
        ("cpu", torch.bfloat16, None, True, "CUDA"),
    ],
)
def test_flash_attention_where_it_can_be_had(device, dtype, capability, built, missing, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    device = torch.device(device)
    assert pick_attention("auto", device, dtype) == ("sdpa" if missing else "flash_attention_2")
    assert pick_attention("eager", device, dtype) == "eager"
    if missing:
        with pytest.raises(InputError, match=f"^--attention flash_attention_2: .*{missing}.*; choose sdpa$"):
            pick_attention("flash_attention_2", device, dtype)


def test_names_and_memory() -> None:
    assert [name_of(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)] == ["bf16", "fp16", "fp32"]
    assert 0.01 < peak_memory_gb(CPU) < 1000


def test_the_environment_names_versions_but_neither_host_nor_user_nor_folder() -> None:
    facts = environment(CPU)
    assert facts["torch"] == torch.__version__
    assert facts["cpu_cores"] == os.cpu_count()
    assert facts["phi3v"] in (phi3v.__version__, None)
    text = json.dumps(facts)
    assert not platform.node() or platform.node() not in text
    assert str(Path(__file__).resolve().parents[2]) not in text
