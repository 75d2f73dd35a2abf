"""How a model is computed: chosen by flags and by what is at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import phi3v.train.build as room
from phi3v.base.config import Run
from phi3v.base.ranks import ALONE, Ranks
from phi3v.data.processor import Phi3VProcessor
from phi3v.model.loading import load_config
from phi3v.train.feed import read_data

MAKE = Callable[..., Run]


@pytest.mark.parametrize(
    ("device", "engine", "flags", "compiled"),
    [
        ("cuda", "ddp", {}, True),
        ("cuda", "ddp", {"lora": True}, True),
        ("cuda", "ddp", {"compile": "off"}, False),
        ("cuda", "ddp", {"lora": True, "dora": True}, False),
        ("cuda", "fsdp2", {}, False),
        ("cpu", "ddp", {}, False),
        ("cpu", "ddp", {"compile": "on"}, True),
    ],
)
def test_layers_are_compiled_where_that_is_tested(device, engine, flags, compiled, settings_for, monkeypatch) -> None:
    monkeypatch.setattr(room, "why_not_compile", lambda device: None)
    assert room.pick_compile(settings_for(**flags), engine, Ranks(device=torch.device(device))) == compiled


@pytest.mark.parametrize(("free_gb", "layers"), [(1.0, 0), (0.0, 4), (0.0079, 1), (0.007, 4)])
def test_a_gpu_recomputes_as_little_as_its_free_memory_needs(
    free_gb: float, layers: int, settings_for: MAKE, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = settings_for()
    processor, config = Phi3VProcessor.from_pretrained(run.base.model), load_config(run.base.model)
    data = read_data(run, processor, config, check_first=True, ranks=ALONE)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_gb * 1e9), 80 * 10**9))
    card = Ranks(device=torch.device("cuda"))
    how: dict[str, Any] = {"attention": "sdpa", "dtype": torch.float32, "engine": "ddp"}
    assert room.pick_recompute(run, config, data, card, **how) == layers
    assert room.pick_recompute(run, config, data, ALONE, **how) == 0
    full = replace(run, tuning=replace(run.tuning, activation_checkpointing="full"))
    assert room.pick_recompute(full, config, data, ALONE, **how) == 4
