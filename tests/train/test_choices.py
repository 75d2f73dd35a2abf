"""How a model is computed: chosen by flags and by what is at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import phi3v.train.choices as room
from phi3v.base.config import Run
from phi3v.base.errors import InputError
from phi3v.base.ranks import ALONE, Ranks
from phi3v.data.processor import Phi3VProcessor
from phi3v.model.loading import load_config
from phi3v.train.choices import Choices, choose, pick_recompute
from phi3v.train.feed import read_data

MAKE = Callable[..., Run]


@pytest.mark.parametrize(
    ("device", "num_ranks", "flags", "compiled"),
    [
        ("cuda", 1, {}, True),
        ("cuda", 1, {"lora": True}, True),
        ("cuda", 1, {"compile": "off"}, False),
        ("cuda", 1, {"lora": True, "dora": True}, False),
        ("cuda", 2, {"parallel": "fsdp2"}, False),
        ("cuda", 2, {"parallel": "ddp"}, True),
        ("cpu", 1, {}, False),
        ("cpu", 1, {"compile": "on"}, True),
    ],
)
def test_layers_are_compiled_where_that_is_tested(
    device: str, num_ranks: int, flags: dict, compiled: bool, settings_for: MAKE, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "why_not_compile", lambda device: None)
    run = settings_for(attention="sdpa", **flags)
    ranks = Ranks(num=num_ranks, device=torch.device(device))
    assert choose(run, load_config(run.base.model), ranks).compiled == compiled


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"compile": "on"}, "--compile on: it needs a compiler"),
        ({"compile": "on", "lora": True, "dora": True}, "--compile on: PEFT's --dora"),
        ({"fp8": True}, "--fp8: it needs a GPU"),
        ({"attention": "flex_attention"}, "--attention flex_attention has no backward pass on a CPU"),
    ],
)
def test_what_cannot_be_computed_here_is_refused_by_its_flag(
    flags: dict, reason: str, settings_for: MAKE, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "why_not_compile", lambda device: "it needs a compiler")
    run = settings_for(**flags)
    with pytest.raises(InputError, match=reason):
        choose(run, load_config(run.base.model), Ranks(device=torch.device("cpu")))


@pytest.mark.parametrize(("free_gb", "layers"), [(1.0, 0), (0.0, 4), (0.0079, 1), (0.007, 4)])
def test_a_gpu_recomputes_as_little_as_its_free_memory_needs(
    free_gb: float, layers: int, settings_for: MAKE, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = settings_for()
    processor, config = Phi3VProcessor.from_pretrained(run.base.model), load_config(run.base.model)
    data = read_data(run, processor, config, check_first=True, ranks=ALONE)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_gb * 1e9), 80 * 10**9))
    card = Ranks(device=torch.device("cuda"))
    assert pick_recompute(run, config, data, card, Choices()) == layers
    assert pick_recompute(run, config, data, ALONE, Choices()) == 0
    full = replace(run, tuning=replace(run.tuning, activation_checkpointing="full"))
    assert pick_recompute(full, config, data, ALONE, Choices()) == 4
